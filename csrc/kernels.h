// What the CPU kernels compute, over a range of rows each; the operators (operators.cpp) share the rows out to threads.
//
// The same source (kernels.inc) is compiled for several instruction sets; `kernels<T>()` picks one for the processor it
// runs on. T is float, or double for tests.
#pragma once

#include <cstdint>

namespace mlfs {

constexpr int64_t RANKS = 16;  // a whole number of vectors of any instruction set

enum Activation { NONE, GELU, GELU_TANH, SILU_MUL };

// h = x · down, y = act(z + bias + h · up) * operand + residual; rows of y are `m` numbers. Null pointers leave a term out.
template <typename T>
struct Finish {
  int64_t m, n, ranks;
  int activation;
  const T* x;  // (rows, n)
  int64_t x_stride;
  const T* down;  // (n, ranks in steps of RANKS), zeros after the ranks
  T* z;         // (rows, m): the product; what goes into act is written here if `keep`
  bool keep;
  const T* bias;  // (m)
  T* h;         // (rows, ranks), written
  const T* up;  // (ranks, m)
  int64_t up_stride;
  const T* operand;
  int64_t operand_stride;
  const T* residual;
  int64_t residual_stride;
  T* y;  // (rows, m); may be z if z is not kept
};

// dz = dy * act'(z) * operand, d_operand = dy * SiLU(z), element by element
template <typename T>
struct ActivationBackward {
  int activation;
  const T *dy, *z, *operand;
  T *dz, *d_operand;
};

// s = residual + dropout(x), y = norm(s) * w + b
template <typename T>
struct AddNorm {
  int64_t n;
  bool rms;
  double eps, p;
  uint64_t seed;
  const T* x;
  int64_t x_stride;
  const T* residual;
  int64_t residual_stride;
  const T *w, *b;
  T *s, *y;  // (rows, n); s is null where nothing is added or dropped
};

template <typename T>
struct AddNormBackward {
  int64_t n;
  bool rms;
  double eps, p;
  uint64_t seed;
  const T *dy, *ds, *s;  // (rows, n); ds may be null
  const T* w;
  T *dx, *d_residual;  // d_residual is null where it is dx
  T *dw, *db;          // (n), added to; null where the norm does not train
};

// o = dropout(softmax(scale * q kᵀ)) v for the tokens of one sequence and one head
template <typename T>
struct Attention {
  int64_t heads, dim;
  int64_t q_stride, k_stride, v_stride;  // from token to token
  double scale, p;
  uint64_t seed;
  const T *q, *k, *v;  // (tokens, heads, dim)
  T* o;                // (tokens, heads, dim)
  T* lse;              // (tokens, heads): log of the sum of exponentials
  const T* d_o;
  T *dq, *dk, *dv;
};

template <typename T>
struct Kernels {
  const char* name;
  void (*finish)(const Finish<T>&, int64_t begin, int64_t end);
  void (*activation_backward)(const ActivationBackward<T>&, int64_t begin, int64_t end);
  void (*add_norm)(const AddNorm<T>&, int64_t begin, int64_t end);
  void (*add_norm_backward)(const AddNormBackward<T>&, int64_t begin, int64_t end);
  void (*attention)(const Attention<T>&, int64_t head, int64_t begin, int64_t end);
  void (*attention_backward)(const Attention<T>&, int64_t head, int64_t begin, int64_t end);
  // 1 / (1 - p) or 0 for numbers (row, 0 .. n)
  void (*dropout_mask)(uint64_t seed, double p, int64_t row, int64_t n, T* mask);
};

template <typename T>
const Kernels<T>& kernels();

}  // namespace mlfs
