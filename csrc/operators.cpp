// The operators of mlfs/ops for CPUs: matrix products by the library (ATen), everything between them by kernels.h.
//
// Tensors are checked in Python; here all have one type (float or double), and those called rows are contiguous.
#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <cmath>
#include <cstring>

#include "kernels.h"

namespace mlfs {

const Kernels<float>& plain_float();
const Kernels<double>& plain_double();
const Kernels<float>& avx2_float();
const Kernels<double>& avx2_double();
const Kernels<float>& avx512_float();
const Kernels<double>& avx512_double();

int choose() {
#if MLFS_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

int chosen = choose();

template <>
const Kernels<float>& kernels<float>() {
#if MLFS_X86
  if (chosen == 2) return avx512_float();
  if (chosen == 1) return avx2_float();
#endif
  return plain_float();
}

template <>
const Kernels<double>& kernels<double>() {
#if MLFS_X86
  if (chosen == 2) return avx512_double();
  if (chosen == 1) return avx2_double();
#endif
  return plain_double();
}

namespace {

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

Maybe contiguous(const Maybe& t) { return t ? Maybe(t->contiguous()) : t; }

Tensor rows_contiguous(const Tensor& t) { return t.stride(-1) == 1 || t.size(-1) <= 1 ? t : t.contiguous(); }

int64_t grain(int64_t numbers_a_row) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(numbers_a_row, 1)); }

int64_t length_of(const Numbers& spans) {
  int64_t m = 0;
  for (size_t i = 1; i < spans.size(); i += 2) m += spans[i];
  return m;
}

// rows of t (or numbers of a vector) that the spans name, side by side; a view where there is one span
Tensor select(const Tensor& t, const Numbers& spans) {
  if (spans.size() == 2) return t.narrow(0, spans[0], spans[1]);
  Tensors parts;
  for (size_t i = 0; i < spans.size(); i += 2) parts.push_back(t.narrow(0, spans[i], spans[i + 1]));
  return at::cat(parts);
}

// Columns of t (R, M) that the spans name, side by side; a view where there is one span
Tensor select_columns(const Tensor& t, const Numbers& spans) {
  if (spans.size() == 2) return t.narrow(1, spans[0], spans[1]);
  Tensors parts;
  for (size_t i = 0; i < spans.size(); i += 2) parts.push_back(t.narrow(1, spans[i], spans[i + 1]));
  return at::cat(parts, 1);
}

// The stages side by side, as the kernel reads them: c_s · A_sᵀ (N, ranks in whole steps), and B_sᵀ (ranks, M)
std::tuple<Tensor, Tensor> pack(const Tensors& a, const Tensors& b, const std::vector<double>& scales) {
  at::NoGradGuard no_grad;
  int64_t ranks = 0, first = 0;
  for (const Tensor& t : a) ranks += t.size(0);
  if (!ranks) throw std::invalid_argument("pack: no stages");
  const Tensor down = at::zeros({a[0].size(1), (ranks + RANKS - 1) / RANKS * RANKS}, a[0].options());
  const Tensor up = at::empty({ranks, b[0].size(0)}, b[0].options());
  for (size_t s = 0; s < a.size(); first += a[s].size(0), s++) {
    down.narrow(1, first, a[s].size(0)).copy_(a[s].t()).mul_(scales[s]);
    up.narrow(0, first, a[s].size(0)).copy_(b[s].t());
  }
  return {down, up};
}

// The stages of a layer, packed; packed again where what they were packed from has changed, however that was written.
class Stages {
 public:
  void update(const Tensors& a, const Tensors& b, const std::vector<double>& scales) {
    if (scales == scales_ && same(a, a_) && same(b, b_)) return;
    a_.clear(), b_.clear(), scales_ = scales, down = up = std::nullopt;
    for (const Tensor& t : a) a_.push_back(t.detach().clone(at::MemoryFormat::Contiguous));
    for (const Tensor& t : b) b_.push_back(t.detach().clone(at::MemoryFormat::Contiguous));
    if (!a.empty()) std::tie(down, up) = pack(a, b, scales);
  }

  Maybe down, up;

 private:
  static bool same(const Tensors& now, const Tensors& before) {
    if (now.size() != before.size()) return false;
    for (size_t i = 0; i < now.size(); i++) {
      const Tensor &x = now[i], &y = before[i];
      if (x.sizes() != y.sizes() || x.scalar_type() != y.scalar_type() || !x.is_contiguous()) return false;
      if (memcmp(x.data_ptr(), y.data_ptr(), x.nbytes())) return false;
    }
    return true;
  }

  Tensors a_, b_;
  std::vector<double> scales_;
};

// y (T, m), h (T, R) = x · A_sᵀ · c_s side by side, z (T, m) before the activation if kept; see mlfs.ops.sliced_linear.
// down, up: of `pack`, or nothing; of `down` the leading rows are read.
std::tuple<Tensor, Tensor, Tensor> linear_forward(const Tensor& x_, const Tensor& weight, const Maybe& bias,
                                                  const Maybe& down, const Maybe& up_, const Numbers& spans,
                                                  int64_t activation, const Maybe& operand_, const Maybe& residual_,
                                                  bool keep) {
  at::NoGradGuard no_grad;
  const Tensor x = down ? rows_contiguous(x_) : x_;
  const int64_t rows = x.size(0), n = x.size(1), m = length_of(spans), ranks = down ? up_->size(0) : 0;
  TORCH_CHECK(n <= weight.size(1) && (!down || n <= down->size(0)), "x has ", n, " columns, W ", weight.size(1));
  for (const Maybe& t : {operand_, residual_})
    TORCH_CHECK(!t || (t->size(0) == rows && t->size(1) == m), "operand or residual of ", t ? t->sizes() : x.sizes(),
                ", the product is of ", rows, " x ", m);
  keep = keep && activation != NONE;
  const Tensor z = at::empty({rows, m}, x.options()), h = at::empty({rows, ranks}, x.options());
  const Tensor y = keep ? at::empty_like(z) : z, kept = keep ? z : at::empty({0}, x.options());
  if (z.numel() == 0) return {y, h.zero_(), kept};
  for (size_t i = 0, column = 0; i < spans.size(); column += spans[i + 1], i += 2) {
    Tensor part = z.narrow(1, column, spans[i + 1]);
    at::mm_out(part, x, weight.narrow(0, spans[i], spans[i + 1]).narrow(1, 0, n).t());
  }
  const Maybe operand = operand_ ? Maybe(rows_contiguous(*operand_)) : operand_;
  const Maybe residual = residual_ ? Maybe(rows_contiguous(*residual_)) : residual_;
  const Maybe shift = bias ? Maybe(select(*bias, spans).contiguous()) : bias;
  const Maybe up = down ? Maybe(select_columns(*up_, spans)) : down;
  if (!shift && !down && activation == NONE && !residual) return {y, h, kept};
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "linear_forward", [&] {
    Finish<scalar_t> work = {};
    work.m = m, work.n = n, work.ranks = ranks, work.activation = activation, work.keep = keep;
    work.x = data<scalar_t>(x), work.x_stride = x.stride(0), work.down = data<scalar_t>(down);
    work.z = data<scalar_t>(z), work.y = data<scalar_t>(y), work.h = data<scalar_t>(h);
    work.bias = data<scalar_t>(shift), work.up = data<scalar_t>(up), work.up_stride = up ? up->stride(0) : 0;
    work.operand = data<scalar_t>(operand), work.operand_stride = operand ? operand->stride(0) : 0;
    work.residual = data<scalar_t>(residual), work.residual_stride = residual ? residual->stride(0) : 0;
    at::parallel_for(0, rows, grain(m), [&](int64_t i, int64_t j) { kernels<scalar_t>().finish(work, i, j); });
  });
  return {y, h, kept};
}

// The same without what a backward pass needs, for stages that seldom change; x and y may have any leading dimensions.
Tensor linear(const Tensor& x, const Tensor& weight, const Maybe& bias, Stages& stages, const Tensors& a,
              const Tensors& b, const std::vector<double>& scales, const Numbers& spans, int64_t activation,
              const Maybe& operand, const Maybe& residual) {
  at::NoGradGuard no_grad;
  const int64_t n = x.size(-1), m = length_of(spans);
  const auto flat = [&](const Maybe& t) { return t ? Maybe(t->reshape({-1, m})) : t; };
  stages.update(a, b, scales);
  const Tensor y = std::get<0>(linear_forward(x.reshape({x.numel() / std::max<int64_t>(n, 1), n}), weight, bias,
                                              stages.down, stages.up, spans, activation, flat(operand), flat(residual),
                                              false));
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = m;
  return y.view(shape);
}

std::tuple<Tensor, Tensor> activation_backward(const Tensor& dy_, const Tensor& z, const Maybe& operand_,
                                               int64_t activation) {
  at::NoGradGuard no_grad;
  const Tensor dy = dy_.contiguous(), dz = at::empty_like(z);
  const Maybe operand = contiguous(operand_);
  const Tensor d_operand = operand ? at::empty_like(z) : at::empty({0}, z.options());
  AT_DISPATCH_FLOATING_TYPES(z.scalar_type(), "activation_backward", [&] {
    const ActivationBackward<scalar_t> work = {(int)activation,         data<scalar_t>(dy), data<scalar_t>(z),
                                               data<scalar_t>(operand), data<scalar_t>(dz), data<scalar_t>(d_operand)};
    at::parallel_for(0, z.numel(), 4096,
                     [&](int64_t i, int64_t j) { kernels<scalar_t>().activation_backward(work, i, j); });
  });
  return {dz, d_operand};
}

// (y, s); s is x where nothing is added or dropped
std::tuple<Tensor, Tensor> add_norm(const Tensor& x_, const Maybe& residual_, const Maybe& weight, const Maybe& bias,
                                    double eps, bool rms, double p, uint64_t seed) {
  at::NoGradGuard no_grad;
  const Tensor x = rows_contiguous(x_), y = at::empty(x.sizes(), x.options());
  const Maybe residual = residual_ ? Maybe(rows_contiguous(*residual_)) : residual_;
  const Maybe w = contiguous(weight), b = contiguous(bias);
  TORCH_CHECK(!residual || residual->sizes() == x.sizes(), "x and residual differ in shape");
  for (const Maybe& t : {w, b}) TORCH_CHECK(!t || t->size(0) == x.size(1), "weight or bias shorter than rows of x");
  const bool changes = residual || p > 0;
  const Tensor s = changes ? at::empty(x.sizes(), x.options()) : x;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "add_norm", [&] {
    const AddNorm<scalar_t> work = {x.size(1), rms, eps, p, seed, data<scalar_t>(x), x.stride(0),
                                    data<scalar_t>(residual), residual ? residual->stride(0) : 0, data<scalar_t>(w),
                                    data<scalar_t>(b), changes ? data<scalar_t>(s) : nullptr, data<scalar_t>(y)};
    at::parallel_for(0, x.size(0), grain(4 * x.size(1)),
                     [&](int64_t i, int64_t j) { kernels<scalar_t>().add_norm(work, i, j); });
  });
  return {y, s};
}

// (dx, d_residual or nothing where it is dx, dw, db (n,) or nothing)
std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_backward(const Tensor& dy_, const Maybe& ds_, const Tensor& s_,
                                                             const Maybe& weight, double eps, bool rms, double p,
                                                             uint64_t seed, bool trains) {
  at::NoGradGuard no_grad;
  const Tensor dy = dy_.contiguous(), s = s_.contiguous(), dx = at::empty_like(s);
  const Maybe ds = contiguous(ds_), w = contiguous(weight);
  const int64_t rows = s.size(0), n = s.size(1);
  const auto nothing = [&] { return at::empty({0}, s.options()); };  // a new one each time: outputs share no memory
  const Tensor d_residual = p > 0 ? at::empty_like(s) : nothing();
  // sums over chunks that do not depend on the threads, so that the result does not either
  const int64_t chunk = trains ? std::max<int64_t>(1, (rows + 63) / 64) : grain(4 * n);
  const int64_t chunks = (rows + chunk - 1) / chunk;
  const Tensor sums = trains ? at::zeros({2, chunks, n}, s.options()) : nothing();
  AT_DISPATCH_FLOATING_TYPES(s.scalar_type(), "add_norm_backward", [&] {
    AddNormBackward<scalar_t> work = {n, rms, eps, p, seed, data<scalar_t>(dy), data<scalar_t>(ds), data<scalar_t>(s),
                                      data<scalar_t>(w), data<scalar_t>(dx),
                                      p > 0 ? data<scalar_t>(d_residual) : nullptr, nullptr, nullptr};
    at::parallel_for(0, chunks, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; i++) {
        AddNormBackward<scalar_t> mine = work;
        if (trains) mine.dw = data<scalar_t>(sums) + i * n, mine.db = mine.dw + chunks * n;
        kernels<scalar_t>().add_norm_backward(mine, i * chunk, std::min(rows, (i + 1) * chunk));
      }
    });
  });
  if (!trains) return {dx, d_residual, nothing(), nothing()};
  return {dx, d_residual, sums[0].sum(0), sums[1].sum(0)};
}

template <typename T>
Attention<T> attention_of(const Tensor& q, const Tensor& k, const Tensor& v, double scale, double p, uint64_t seed) {
  Attention<T> work = {};
  work.heads = q.size(1), work.dim = q.size(2);
  work.q_stride = q.stride(0), work.k_stride = k.stride(0), work.v_stride = v.stride(0);
  work.scale = scale, work.p = p, work.seed = seed;
  work.q = data<T>(q), work.k = data<T>(k), work.v = data<T>(v);
  return work;
}

// Runs `one(head, begin, end)` for every head of every sequence
template <typename F>
void over_heads(const Tensor& offsets, int64_t heads, const F& one) {
  const int64_t* ends = offsets.data_ptr<int64_t>();
  at::parallel_for(0, (offsets.numel() - 1) * heads, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++)
      if (ends[i / heads + 1] > ends[i / heads]) one(i % heads, ends[i / heads], ends[i / heads + 1]);
  });
}

Tensor by_heads(const Tensor& t) {
  return t.stride(2) == 1 && t.stride(1) == t.size(2) ? t : t.contiguous();
}

// q, k, v (tokens, heads, dim); offsets: where each sequence starts, and the end. (o, lse (tokens, heads))
std::tuple<Tensor, Tensor> attention(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& offsets,
                                     double scale, double p, uint64_t seed) {
  at::NoGradGuard no_grad;
  const Tensor q = by_heads(q_), k = by_heads(k_), v = by_heads(v_);
  const Tensor o = at::empty(q.sizes(), q.options()), lse = at::empty({q.size(0), q.size(1)}, q.options());
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "attention", [&] {
    auto work = attention_of<scalar_t>(q, k, v, scale, p, seed);
    work.o = data<scalar_t>(o), work.lse = data<scalar_t>(lse);
    over_heads(offsets, q.size(1), [&](int64_t head, int64_t begin, int64_t end) {
      kernels<scalar_t>().attention(work, head, begin, end);
    });
  });
  return {o, lse};
}

Tensors attention_backward(const Tensor& d_o_, const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& o,
                           const Tensor& lse, const Tensor& offsets, double scale, double p, uint64_t seed) {
  at::NoGradGuard no_grad;
  const Tensor q = by_heads(q_), k = by_heads(k_), v = by_heads(v_), d_o = d_o_.contiguous();
  const Tensor dq = at::empty(q.sizes(), q.options()), dk = at::empty_like(dq), dv = at::empty_like(dq);
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "attention_backward", [&] {
    auto work = attention_of<scalar_t>(q, k, v, scale, p, seed);
    work.o = data<scalar_t>(o), work.lse = data<scalar_t>(lse), work.d_o = data<scalar_t>(d_o);
    work.dq = data<scalar_t>(dq), work.dk = data<scalar_t>(dk), work.dv = data<scalar_t>(dv);
    over_heads(offsets, q.size(1), [&](int64_t head, int64_t begin, int64_t end) {
      kernels<scalar_t>().attention_backward(work, head, begin, end);
    });
  });
  return {dq, dk, dv};
}

// (rows, columns): 1 / (1 - p), or 0 for what dropout drops
Tensor dropout_mask(int64_t rows, int64_t columns, double p, uint64_t seed) {
  const int64_t whole = (columns + 63) / 64 * 64;
  const Tensor mask = at::empty({rows, whole}, at::kFloat);
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      kernels<float>().dropout_mask(seed, p, t, columns, data<float>(mask) + t * whole);
  });
  return mask.narrow(1, 0, columns);
}

std::string instructions() { return kernels<float>().name; }

// For tests: at most the `level`-th instruction set (0 plain, 1 AVX2, 2 AVX-512); the one in use is returned.
std::string limit_instructions(int level) {
  chosen = std::min(level, choose());
  return instructions();
}

}  // namespace
}  // namespace mlfs

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  const auto free = pybind11::call_guard<pybind11::gil_scoped_release>();
  m.def("pack", &mlfs::pack, free);
  pybind11::class_<mlfs::Stages>(m, "Stages")
      .def(pybind11::init<>())
      .def(pybind11::pickle([](const mlfs::Stages&) { return pybind11::tuple(); },  // a copy packs anew
                            [](const pybind11::tuple&) { return mlfs::Stages(); }));
  m.def("linear", &mlfs::linear);
  m.def("linear_forward", &mlfs::linear_forward, free);
  m.def("activation_backward", &mlfs::activation_backward, free);
  m.def("add_norm", &mlfs::add_norm, free);
  m.def("add_norm_backward", &mlfs::add_norm_backward, free);
  m.def("attention", &mlfs::attention, free);
  m.def("attention_backward", &mlfs::attention_backward, free);
  m.def("dropout_mask", &mlfs::dropout_mask, free);
  m.def("instructions", &mlfs::instructions);
  m.def("limit_instructions", &mlfs::limit_instructions);
}
