// The kernels for AVX2.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "kernels.h"

#if MLFS_X86
// after the headers: what they define is shared with code for older processors
#pragma GCC target("avx2,fma")

#define VECTOR_BYTES 32
#define INSTRUCTIONS "avx2"

namespace mlfs {
#include "vectors.inc"
#include "product.inc"
#include "kernels.inc"

const Kernels<float>& avx2_float() { return TABLE<float>; }
const Kernels<double>& avx2_double() { return TABLE<double>; }
}  // namespace mlfs
#endif
