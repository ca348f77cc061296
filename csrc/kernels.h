// What the CPU kernels compute, over a range of rows each; the operators (operators.cpp) share the rows out to threads.
//
// The same source (kernels.inc) is compiled for several instruction sets; `kernels<T>()` picks one for the processor it
// runs on. T is float, or double for tests.
#pragma once

#include <cstdint>

namespace mlfs {

enum Activation { NONE, GELU, GELU_TANH, SILU_MUL };

// Numbers a (rows, depth) and b (columns, depth), of any strides, of which a product takes a · bᵀ
template <typename T>
struct Piece {
  const T* a;
  int64_t a_i, a_k;  // from row to row, and along the depth
  const T* b;
  int64_t b_j, b_k;
  int64_t depth;
};

constexpr int64_t FEW_ROWS = 32;  // of which products read b as it lies: packing would not pay

// y = act(scale * Σ a · bᵀ + bias) * operand + residual over pieces one after the other in the same sum. Rows of z, y,
// operand and residual are `columns` numbers side by side; null pointers leave a term out.
template <typename T>
struct Product {
  int64_t rows, columns;
  const Piece<T>* pieces;
  int64_t count;
  // What b of the only piece is without: Σ scale * a · bᵀ, transposed, of a (depth, rank) and b (columns, rank). It is
  // added to b where b is packed.
  const Piece<T>* updates;
  int64_t update_count;
  const T* update_scales;
  T scale;
  int activation;
  const T* bias;  // (columns)
  T* z;           // what goes into act, written if wanted
  int64_t z_stride;
  const T* operand;
  int64_t operand_stride;
  const T* residual;
  int64_t residual_stride;
  T* y;
  int64_t y_stride;
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

// What attends to what: the queries [from, to) of a batch row to its keys [first, last); with a causal mask, query i only
// to keys up to `position` + i - from
struct Range {
  int64_t row, from, to, first, last, position;
};

// Numbers (batch row, token, head, dim), the last side by side
template <typename T>
struct Heads {
  T* at;
  int64_t row, token, head;  // from one to the next

  T* operator()(int64_t r, int64_t t, int64_t h) const { return at + r * row + t * token + h * head; }
};

// o = dropout(softmax(scale * q kᵀ)) v. `group` heads of q share one of k and v.
template <typename T>
struct Attention {
  int64_t tokens, heads, group, dim;  // tokens: of a batch row of q
  bool causal;
  double scale, p;
  uint64_t seed;
  Heads<const T> q, k, v;
  Heads<T> o;
  T* lse;  // (rows, tokens, heads): log of the sum of exponentials
  Heads<const T> d_o;
  Heads<T> dq, dk, dv;  // dk and dv are added to
};

// Task loss and divergence of rows of logits, and their gradient over z: see mlfs.ops.head_loss
template <typename T>
struct HeadRows {
  int64_t vocabulary;
  T* z;
  int64_t z_stride;
  const T* u;  // the teacher's, or null
  int64_t u_stride;
  const int64_t* labels;
  T *task, *divergence;  // (rows)
  double alpha, temperature, smoothing;
  bool keep;  // whether the gradient is wanted
};

template <typename T>
struct Kernels {
  const char* name;
  int64_t rows, width;  // of a tile of a product
  int64_t group;        // tiles beside each other that read a while it is in a cache
  void (*multiply)(const Product<T>&, int64_t row, int64_t last_row, int64_t column, int64_t last_column);
  void (*activation_backward)(const ActivationBackward<T>&, int64_t begin, int64_t end);
  void (*add_norm)(const AddNorm<T>&, int64_t begin, int64_t end);
  void (*add_norm_backward)(const AddNormBackward<T>&, int64_t begin, int64_t end);
  void (*attention)(const Attention<T>&, const Range&, int64_t head);           // a head of q
  void (*attention_backward)(const Attention<T>&, const Range&, int64_t head);  // a head of k and v
  void (*head_rows)(const HeadRows<T>&, int64_t begin, int64_t end);
  // y = x · cos + turn(x) · sin, or the transposed rotation, for the heads of one token, `x_head` and `dim` apart
  void (*rotate)(const T* x, int64_t x_head, int64_t heads, int64_t dim, const T* cos, const T* sin, bool back, T* y);
  // 1 / (1 - p) or 0 for numbers (row, 0 .. n)
  void (*dropout_mask)(uint64_t seed, double p, int64_t row, int64_t n, T* mask);
};

template <typename T>
const Kernels<T>& kernels();

[[noreturn]] void out_of_memory(size_t bytes);  // throws; what the kernels throw reaches the operator's caller

}  // namespace mlfs
