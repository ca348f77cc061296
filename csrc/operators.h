// What the operators share: tensors as the kernels read them.
#pragma once

#include <torch/extension.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace mlfs {

using at::Tensor;
using Maybe = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using Numbers = std::vector<int64_t>;

template <typename T>
T* data(const Tensor& t) {
  return t.data_ptr<T>();
}

template <typename T>
T* data(const Maybe& t) {
  return t ? t->data_ptr<T>() : nullptr;
}

// More numbers than a memory holds; small enough that nothing computed from the sizes below overflows
constexpr int64_t LARGEST = int64_t(1) << 48;

// Whether the product of the sizes, leaving out zeros, is one the kernels can count with: a tensor that is expanded, or
// has no numbers, can have any
inline bool is_countable(at::IntArrayRef sizes) {
  int64_t numbers = 1;
  for (int64_t size : sizes)
    if (size && (__builtin_mul_overflow(numbers, size, &numbers) || numbers > LARGEST)) return false;
  return true;
}

// Throws unless t has `dims` dimensions, lies in memory that the kernels can read, and has the type asked for
inline void check_tensor(const Tensor& t, int64_t dims, at::ScalarType type, const char* what) {
  TORCH_CHECK(t.dim() == dims && t.scalar_type() == type && t.is_cpu() && t.layout() == at::kStrided, what,
              ": expected ", type, " of ", dims, " dimensions on the CPU, got ", t.scalar_type(), " of sizes ",
              t.sizes(), " on ", t.device());
  TORCH_CHECK(is_countable(t.sizes()), what, ": sizes ", t.sizes(), " are too large");
  TORCH_CHECK(!t.is_neg(), what, ": a view that is negated when it is read; call resolve_neg() on it first");
}

inline void check_tensor(const Maybe& t, int64_t dims, at::ScalarType type, const char* what) {
  if (t) check_tensor(*t, dims, type, what);
}

// Throws unless the activation is one, and has the operand it multiplies with, or needs none
inline void check_activation(int64_t activation, bool has_operand) {
  TORCH_CHECK(NONE <= activation && activation <= SILU_MUL, "activation ", activation, ": expected 0 to ", SILU_MUL);
  TORCH_CHECK(has_operand == (activation == SILU_MUL), "an operand goes with SiLU, and with nothing else");
}

inline void check_dropout(double p) { TORCH_CHECK(0 <= p && p < 1, "dropout of ", p, ": expected 0 to below 1"); }

inline Maybe contiguous(const Maybe& t) { return t ? Maybe(t->contiguous()) : t; }

inline Tensor rows_contiguous(const Tensor& t) { return t.stride(-1) == 1 || t.size(-1) <= 1 ? t : t.contiguous(); }

inline Maybe rows_contiguous(const Maybe& t) { return t ? Maybe(rows_contiguous(*t)) : t; }

// A linear layer: weight (M, N) of any strides, bias (M) or none, stages' a (r, N), b (M, r) and scales, and the rows
// that are read, as (start, length) pairs
using Layer = std::tuple<Tensor, Maybe, Tensors, Tensors, std::vector<double>, Numbers>;

// y, h = the stages' scale · x aᵀ side by side, and z, what went into the activation (empty unless kept)
using Forward = std::tuple<Tensor, Tensor, Tensor>;

std::vector<Forward> linear_forward(const Tensor& x, const std::vector<Layer>& layers, int64_t activation,
                                    const Maybe& operand, const Maybe& residual, bool keep);
// y alone
Tensors linear_outputs(const Tensor& x, const std::vector<Layer>& layers, int64_t activation, const Maybe& operand,
                       const Maybe& residual);
std::tuple<Tensor, std::vector<Tensors>> linear_backward(const Tensors& dy, const Maybe& x, const std::vector<Maybe>& h,
                                                         const std::vector<Layer>& layers,
                                                         const std::vector<std::vector<bool>>& trains, bool needs_dx,
                                                         int64_t n);
Tensor product(const Tensor& a, const Tensor& b, const Maybe& bias, const Tensor& out);
Tensors linear(const Tensor& x, const std::vector<Layer>& layers, int64_t activation, const Maybe& operand,
               const Maybe& residual);

// (y, s); s is x where nothing is added or dropped
std::tuple<Tensor, Tensor> add_norm(const Tensor& x, const Maybe& residual, const Maybe& weight, const Maybe& bias,
                                    double eps, bool rms, double p, uint64_t seed);

// q (rows, tokens, heads, dim), k, v (rows, keys, heads / group, dim): (o as q, lse (rows, tokens, heads)); zeros for
// queries in no range
std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& ranges,
                                     bool causal, double scale, double p, uint64_t seed);

using Norm = std::tuple<Maybe, Maybe, double>;  // weight, bias, eps

Tensor encoder_layer(const Tensor& x, const std::vector<Layer>& projections, const Layer& out, const Norm& norm,
                     const Layer& up, int64_t activation, const Layer& down, const Norm& last_norm,
                     const Tensor& ranges, int64_t dim, double scale);

}  // namespace mlfs
