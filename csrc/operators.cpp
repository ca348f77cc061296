// The operators of mlfs/ops for CPUs but the linear layers (linear.cpp), and the module that has them all.
//
// The kernels read and write what they are told to, so that each operator checks all that it is given. All numbers have
// one type (float or double); those called rows are contiguous.
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>

#include <atomic>

#include "operators.h"

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

void out_of_memory(size_t bytes) { TORCH_CHECK(false, "no memory for ", bytes, " bytes of scores or sums"); }

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

int64_t grain(int64_t numbers_a_row) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(numbers_a_row, 1)); }

std::tuple<Tensor, Tensor> activation_backward(const Tensor& dy_, const Tensor& z_, const Maybe& operand_,
                                               int64_t activation) {
  at::NoGradGuard no_grad;
  check_tensor(z_, z_.dim(), z_.scalar_type(), "z");
  check_tensor(dy_, z_.dim(), z_.scalar_type(), "dy");
  check_tensor(operand_, z_.dim(), z_.scalar_type(), "operand");
  check_activation(activation, operand_.has_value());
  TORCH_CHECK(activation != NONE && dy_.sizes() == z_.sizes() && (!operand_ || operand_->sizes() == z_.sizes()),
              "activation ", activation, "'s gradient of ", dy_.sizes(), ", z is of ", z_.sizes());
  const Tensor dy = dy_.contiguous(), z = z_.contiguous(), dz = at::empty(z.sizes(), z.options());
  const Maybe operand = contiguous(operand_);
  const Tensor d_operand = operand ? at::empty(z.sizes(), z.options()) : at::empty({0}, z.options());
  AT_DISPATCH_FLOATING_TYPES(z.scalar_type(), "activation_backward", [&] {
    const ActivationBackward<scalar_t> work = {(int)activation,         data<scalar_t>(dy), data<scalar_t>(z),
                                               data<scalar_t>(operand), data<scalar_t>(dz), data<scalar_t>(d_operand)};
    at::parallel_for(0, z.numel(), 4096,
                     [&](int64_t i, int64_t j) { kernels<scalar_t>().activation_backward(work, i, j); });
  });
  return {dz, d_operand};
}

}  // namespace

std::tuple<Tensor, Tensor> add_norm(const Tensor& x_, const Maybe& residual_, const Maybe& weight, const Maybe& bias,
                                    double eps, bool rms, double p, uint64_t seed) {
  at::NoGradGuard no_grad;
  check_tensor(x_, 2, x_.scalar_type(), "x");
  check_tensor(residual_, 2, x_.scalar_type(), "residual");
  for (const Maybe& t : {weight, bias}) {
    check_tensor(t, 1, x_.scalar_type(), "weight or bias");
    TORCH_CHECK(!t || t->size(0) == x_.size(1), "weight or bias shorter than rows of x");
  }
  TORCH_CHECK(!residual_ || residual_->sizes() == x_.sizes(), "x and residual differ in shape");
  check_dropout(p);
  const Tensor x = rows_contiguous(x_), y = at::empty(x.sizes(), x.options());
  const Maybe residual = rows_contiguous(residual_);
  const Maybe w = contiguous(weight), b = contiguous(bias);
  const bool changes = residual || p > 0;
  const Tensor s = changes ? at::empty(x.sizes(), x.options()) : x;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "add_norm", [&] {
    const AddNorm<scalar_t> work = {x.size(1), rms, eps, p, seed, data<scalar_t>(x), x.stride(0),
                                    data<scalar_t>(residual), residual ? residual->stride(0) : 0, data<scalar_t>(w),
                                    data<scalar_t>(b), changes ? data<scalar_t>(s) : nullptr, data<scalar_t>(y)};
    at::parallel_for(0, x.numel() ? x.size(0) : 0, grain(4 * x.size(1)),
                     [&](int64_t i, int64_t j) { kernels<scalar_t>().add_norm(work, i, j); });
  });
  return {y, s};
}

namespace {

// (dx, d_residual or nothing where it is dx, dw, db (n,) or nothing)
std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_backward(const Tensor& dy_, const Maybe& ds_, const Tensor& s_,
                                                             const Maybe& weight, double eps, bool rms, double p,
                                                             uint64_t seed, bool trains) {
  at::NoGradGuard no_grad;
  check_tensor(s_, 2, s_.scalar_type(), "s");
  for (const Maybe& t : {Maybe(dy_), ds_}) {
    check_tensor(t, 2, s_.scalar_type(), "dy or ds");
    TORCH_CHECK(!t || t->sizes() == s_.sizes(), "a norm's gradient of ", t->sizes(), ", s is of ", s_.sizes());
  }
  check_tensor(weight, 1, s_.scalar_type(), "weight");
  TORCH_CHECK(!weight || weight->size(0) == s_.size(1), "weight or bias shorter than rows of s");
  check_dropout(p);
  const Tensor dy = dy_.contiguous(), s = s_.contiguous(), dx = at::empty(s.sizes(), s.options());
  const Maybe ds = contiguous(ds_), w = contiguous(weight);
  const int64_t rows = s.numel() ? s.size(0) : 0, n = s.size(1);
  const auto nothing = [&] { return at::empty({0}, s.options()); };  // a new one each time: outputs share no memory
  const Tensor d_residual = p > 0 ? at::empty(s.sizes(), s.options()) : nothing();
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
Heads<T> heads_of(const Tensor& t) {
  return {const_cast<T*>(t.data_ptr<std::remove_const_t<T>>()), t.stride(0), t.stride(1), t.stride(2)};
}

// Checks everything that the kernels rely on. The columns of `ranges` are the members of `Range`.
template <typename T>
Attention<T> attention_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& ranges, bool causal,
                          double scale, double p, uint64_t seed) {
  for (const Tensor& t : {q, k, v}) check_tensor(t, 4, q.scalar_type(), "q, k or v");
  check_dropout(p);
  TORCH_CHECK(k.sizes() == v.sizes() && k.size(0) == q.size(0) &&
                  k.size(3) == q.size(3) && k.size(2) > 0 && q.size(2) % k.size(2) == 0,
              "attention of q ", q.sizes(), ", k ", k.sizes(), ", v ", v.sizes());
  check_tensor(ranges, 2, at::kLong, "ranges");
  TORCH_CHECK(ranges.is_contiguous() && ranges.size(1) == 6, "ranges: expected int64 (any, 6)");
  const Range* all = reinterpret_cast<const Range*>(ranges.data_ptr<int64_t>());
  for (int64_t i = 0; i < ranges.size(0); i++) {
    const Range& r = all[i];
    TORCH_CHECK(r.row >= 0 && r.row < q.size(0) && 0 <= r.from && r.from <= r.to && r.to <= q.size(1) &&
                    0 <= r.first && r.first <= r.last && r.last <= k.size(1) && -LARGEST <= r.position &&
                    r.position <= LARGEST,
                "range ", i, " is outside of q ", q.sizes(), " or k ", k.sizes());
    const Range* before = i ? &all[i - 1] : nullptr;
    TORCH_CHECK(!before || r.row > before->row ||
                    (r.row == before->row && r.from >= before->to && r.first >= before->last),
                "range ", i, " overlaps the one before, or does not follow it");
  }
  Attention<T> work = {};
  work.tokens = q.size(1), work.heads = q.size(2), work.group = q.size(2) / k.size(2), work.dim = q.size(3);
  work.causal = causal, work.scale = scale, work.p = p, work.seed = seed;
  work.q = heads_of<const T>(q), work.k = heads_of<const T>(k), work.v = heads_of<const T>(v);
  return work;
}

// Runs `one(range, head)` for every range and head. Ranges differ in length, so that each thread takes the next one when
// it has done its last.
template <typename F>
void over_heads(const Tensor& ranges, int64_t heads, const F& one) {
  const Range* all = reinterpret_cast<const Range*>(ranges.data_ptr<int64_t>());
  const int64_t count = ranges.size(0) * heads;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;)
      if (all[i / heads].to > all[i / heads].from) one(all[i / heads], i % heads);
  });
}

}  // namespace

std::tuple<Tensor, Tensor> attention(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& ranges,
                                     bool causal, double scale, double p, uint64_t seed) {
  at::NoGradGuard no_grad;
  for (const Tensor& t : {q_, k_, v_}) check_tensor(t, 4, q_.scalar_type(), "q, k or v");
  const Tensor q = rows_contiguous(q_), k = rows_contiguous(k_), v = rows_contiguous(v_);
  const Tensor o = at::zeros(q.sizes(), q.options());
  const Tensor lse = at::zeros({q.size(0), q.size(1), q.size(2)}, q.options());
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "attention", [&] {
    auto work = attention_of<scalar_t>(q, k, v, ranges, causal, scale, p, seed);
    work.o = heads_of<scalar_t>(o), work.lse = data<scalar_t>(lse);
    if (!lse.numel()) return;
    over_heads(ranges, q.size(2), [&](const Range& r, int64_t head) { kernels<scalar_t>().attention(work, r, head); });
  });
  return {o, lse};
}

namespace {

Tensors attention_backward(const Tensor& d_o_, const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& o_,
                           const Tensor& lse_, const Tensor& ranges, bool causal, double scale, double p,
                           uint64_t seed) {
  at::NoGradGuard no_grad;
  for (const Tensor& t : {q_, k_, v_, o_, d_o_}) check_tensor(t, 4, q_.scalar_type(), "q, k, v, o or its gradient");
  check_tensor(lse_, 3, q_.scalar_type(), "lse");
  const Tensor q = rows_contiguous(q_), k = rows_contiguous(k_), v = rows_contiguous(v_), d_o = rows_contiguous(d_o_);
  const Tensor o = rows_contiguous(o_), lse = lse_.contiguous(), dq = at::zeros(q.sizes(), q.options());
  const Tensor dk = at::zeros(k.sizes(), q.options()), dv = at::zeros(k.sizes(), q.options());
  TORCH_CHECK(o.sizes() == q.sizes() && d_o.sizes() == q.sizes() && lse.sizes() == q.sizes().slice(0, 3),
              "attention's gradient of ", d_o.sizes(), ", q is of ", q.sizes());
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "attention_backward", [&] {
    auto work = attention_of<scalar_t>(q, k, v, ranges, causal, scale, p, seed);
    work.o = heads_of<scalar_t>(o), work.lse = data<scalar_t>(lse), work.d_o = heads_of<const scalar_t>(d_o);
    work.dq = heads_of<scalar_t>(dq), work.dk = heads_of<scalar_t>(dk), work.dv = heads_of<scalar_t>(dv);
    if (!lse.numel()) return;
    over_heads(ranges, k.size(2), [&](const Range& r, int64_t head) {
      kernels<scalar_t>().attention_backward(work, r, head);
    });
  });
  return {dq, dk, dv};
}

// q and k (rows, tokens, heads, dim), cos and sin (rows or 1, tokens, dim): see mlfs.ops.rotary
std::tuple<Tensor, Tensor> rotary(const Tensor& q_, const Tensor& k_, const Tensor& cos_, const Tensor& sin_, bool back) {
  at::NoGradGuard no_grad;
  for (const Tensor& t : {q_, k_}) check_tensor(t, 4, q_.scalar_type(), "q or k");
  for (const Tensor& t : {cos_, sin_}) check_tensor(t, 3, q_.scalar_type(), "cos or sin");
  const Tensor q = rows_contiguous(q_), k = rows_contiguous(k_), cos = cos_.contiguous(), sin = sin_.contiguous();
  const int64_t rows = q.size(0), tokens = q.size(1), dim = q.size(3);
  TORCH_CHECK(k.size(0) == rows && k.size(1) == tokens && k.size(3) == dim && dim % 2 == 0 &&
                  cos.sizes() == sin.sizes() && (cos.size(0) == rows || cos.size(0) == 1) && cos.size(1) == tokens &&
                  cos.size(2) == dim,
              "rotary embeddings of q ", q.sizes(), ", k ", k.sizes(), ", cos ", cos.sizes());
  const Tensor one = at::empty(q.sizes(), q.options()), two = at::empty(k.sizes(), k.options());
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "rotary", [&] {
    const int64_t all = one.numel() || two.numel() ? rows * tokens : 0;
    at::parallel_for(0, all, grain(q.size(2) * dim), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t row = i / tokens, token = i % tokens, angle = (cos.size(0) == 1 ? token : i) * dim;
        for (const auto& [x, y] : {std::pair<const Tensor&, const Tensor&>{q, one}, {k, two}})
          kernels<scalar_t>().rotate(data<scalar_t>(x) + row * x.stride(0) + token * x.stride(1), x.stride(2), x.size(2),
                                     dim, data<scalar_t>(cos) + angle, data<scalar_t>(sin) + angle, back,
                                     data<scalar_t>(y) + i * y.size(2) * dim);
      }
    });
  });
  return {one, two};
}

// Writes sums (2, rows) of logits z and u (rows, vocabulary), and the gradient over z: see mlfs.ops.head_loss
void head_rows(const Tensor& z, const Maybe& u, const Tensor& labels_, const Tensor& sums, double alpha,
               double temperature, double smoothing, bool keep) {
  check_tensor(z, 2, z.scalar_type(), "logits");
  check_tensor(u, 2, z.scalar_type(), "the teacher's logits");
  check_tensor(labels_, 1, at::kLong, "labels");
  check_tensor(sums, 2, z.scalar_type(), "sums");
  const Tensor labels = labels_.contiguous();
  const int64_t rows = z.size(0), vocabulary = z.size(1);
  const auto fits = [&](const Tensor& t) { return t.sizes() == z.sizes() && t.stride(1) == 1; };
  TORCH_CHECK(fits(z) && (!u || fits(*u)) && labels.size(0) == rows && sums.size(0) == 2 && sums.size(1) == rows &&
                  sums.stride(1) == 1,
              "loss of logits ", z.sizes(), ", labels ", labels.sizes(), ", sums ", sums.sizes());
  at::assert_no_internal_overlap(z), at::assert_no_internal_overlap(sums), at::assert_no_overlap(z, sums);
  if (u) at::assert_no_partial_overlap(z, *u), at::assert_no_overlap(*u, sums);
  for (int64_t i = 0; i < rows; i++)
    TORCH_CHECK_INDEX(data<int64_t>(labels)[i] >= 0 && data<int64_t>(labels)[i] < vocabulary, "label ",
                      data<int64_t>(labels)[i], " of a vocabulary of ", vocabulary);
  AT_DISPATCH_FLOATING_TYPES(z.scalar_type(), "head_rows", [&] {
    const HeadRows<scalar_t> work = {vocabulary, data<scalar_t>(z), z.stride(0), data<scalar_t>(u),
                                     u ? u->stride(0) : 0, data<int64_t>(labels), data<scalar_t>(sums),
                                     data<scalar_t>(sums) + sums.stride(0), alpha, temperature, smoothing, keep};
    at::parallel_for(0, rows, grain(8 * vocabulary),
                     [&](int64_t i, int64_t j) { kernels<scalar_t>().head_rows(work, i, j); });
  });
}

// (rows, columns): 1 / (1 - p), or 0 for what dropout drops
Tensor dropout_mask(int64_t rows, int64_t columns, double p, uint64_t seed) {
  TORCH_CHECK(0 <= rows && rows <= LARGEST && 0 <= columns && columns <= LARGEST, "a mask of ", rows,
              " rows and ", columns, " columns");
  check_dropout(p);
  const int64_t whole = (columns + 63) / 64 * 64;
  const Tensor mask = at::empty({rows, whole}, at::kFloat);
  at::parallel_for(0, columns ? rows : 0, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      kernels<float>().dropout_mask(seed, p, t, columns, data<float>(mask) + t * whole);
  });
  return mask.narrow(1, 0, columns);
}

std::string instructions() { return kernels<float>().name; }

// For tests: at most the `level`-th instruction set (0 plain, 1 AVX2, 2 AVX-512); the one in use is returned.
std::string limit_instructions(int level) {
  TORCH_CHECK(0 <= level && level <= 2, "level ", level, ": expected 0 to 2");
  chosen = std::min(level, choose());
  return instructions();
}

}  // namespace
}  // namespace mlfs

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  const auto free = pybind11::call_guard<pybind11::gil_scoped_release>();
  m.def("product", &mlfs::product, free);
  m.def("linear", &mlfs::linear, free);
  m.def("encoder_layer", &mlfs::encoder_layer, free);
  m.def("linear_forward", &mlfs::linear_forward, free);
  m.def("linear_backward", &mlfs::linear_backward, free);
  m.def("activation_backward", &mlfs::activation_backward, free);
  m.def("add_norm", &mlfs::add_norm, free);
  m.def("add_norm_backward", &mlfs::add_norm_backward, free);
  m.def("attention", &mlfs::attention, free);
  m.def("attention_backward", &mlfs::attention_backward, free);
  m.def("head_rows", &mlfs::head_rows, free);
  m.def("rotary", &mlfs::rotary, free);
  m.def("dropout_mask", &mlfs::dropout_mask, free);
  m.def("instructions", &mlfs::instructions);
  m.def("limit_instructions", &mlfs::limit_instructions);
}
