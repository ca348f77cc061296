// The kernels for any processor.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "kernels.h"

#define VECTOR_BYTES 16
#define INSTRUCTIONS "plain"

namespace mlfs {
#include "vectors.inc"
#include "product.inc"
#include "kernels.inc"

const Kernels<float>& plain_float() { return TABLE<float>; }
const Kernels<double>& plain_double() { return TABLE<double>; }
}  // namespace mlfs
