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
