// Whole layers without gradients: between the products of a few tokens, calls from Python would take most of the time.
#include "operators.h"

namespace mlfs {

// The layer of encoders like BERT: t = norm(x + out(attention(x))), y = last_norm(t + down(act(up(t)))), of
// x (rows, tokens, n). dim: of a head. ranges: as `attention` takes them.
Tensor encoder_layer(const Tensor& x, const std::vector<Layer>& projections, const Layer& out, const Norm& norm,
                     const Layer& up, int64_t activation, const Layer& down, const Norm& last_norm,
                     const Tensor& ranges, int64_t dim, double scale) {
  at::NoGradGuard no_grad;
  check_tensor(x, 3, x.scalar_type(), "x");
  TORCH_CHECK(projections.size() == 3 && dim > 0, "an encoder layer projects x thrice, to heads of a size");
  const int64_t rows = x.size(0), tokens = x.size(1);
  const Tensor flat = x.reshape({rows * tokens, x.size(2)});
  const auto one = [](const Tensor& from, const Layer& layer, int64_t act, const Maybe& residual) {
    return linear_outputs(from, {layer}, act, std::nullopt, residual)[0];
  };
  const auto normed = [](const Tensor& s, const Norm& of) {
    const auto& [weight, bias, eps] = of;
    const auto cut = [&](const Maybe& t) { return t ? Maybe(t->narrow(0, 0, s.size(1))) : t; };
    return std::get<0>(add_norm(s, std::nullopt, cut(weight), cut(bias), eps, false, 0, 0));
  };
  Tensors heads;
  for (const Tensor& y : linear_outputs(flat, projections, NONE, std::nullopt, std::nullopt)) {
    TORCH_CHECK(y.size(1) % dim == 0, "a projection to ", y.size(1), " numbers, heads have ", dim);
    heads.push_back(y.view({rows, tokens, y.size(1) / dim, dim}));
  }
  const Tensor o = std::get<0>(attention(heads[0], heads[1], heads[2], ranges, false, scale, 0, 0));
  const Tensor t = normed(one(o.view({rows * tokens, o.size(2) * dim}), out, NONE, flat), norm);
  return normed(one(one(t, up, activation, std::nullopt), down, NONE, t), last_norm).view(x.sizes());
}

}  // namespace mlfs
