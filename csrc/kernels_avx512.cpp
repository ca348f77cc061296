// The kernels for AVX-512.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "kernels.h"

#if MLFS_X86
// after the headers: what they define is shared with code for older processors
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,prefer-vector-width=512")

#define VECTOR_BYTES 64
#define INSTRUCTIONS "avx512"

namespace mlfs {
#include "vectors.inc"
#include "product.inc"
#include "kernels.inc"

const Kernels<float>& avx512_float() { return TABLE<float>; }
const Kernels<double>& avx512_double() { return TABLE<double>; }
}  // namespace mlfs
#endif
