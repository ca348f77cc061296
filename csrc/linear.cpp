// Linear layers with their low-rank stages, forward and backward; several layers may read the same x.
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <deque>

#include "operators.h"

namespace mlfs {

namespace {

// Products that run side by side
template <typename T>
class Products {
 public:
  Product<T>& add(int64_t rows, int64_t columns, std::vector<Piece<T>> pieces, T scale, T* y, int64_t y_stride) {
    pieces_.push_back(std::move(pieces));
    Product<T>& p = products_.emplace_back();
    p.rows = rows, p.columns = columns, p.scale = scale, p.y = y, p.y_stride = y_stride, p.activation = NONE;
    p.pieces = pieces_.back().data(), p.count = pieces_.back().size();
    return p;
  }

  void update(Product<T>& p, std::vector<Piece<T>> updates, const T* scales) {
    pieces_.push_back(std::move(updates));
    p.updates = pieces_.back().data(), p.update_count = pieces_.back().size(), p.update_scales = scales;
  }

  void run() const {
    const Kernels<T>& k = kernels<T>();
    const int64_t threads = at::get_num_threads();  // asked once: a thread that has not worked yet counts others
    const auto ceil = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    // A unit of work has `block` rows, few, so that threads get as much each, and `wide` columns: as many as are
    // multiplied at once, or fewer, so that no two threads pack the same ones; many rows want four tiles or more, as all
    // of a is read for each unit's columns.
    const auto block = [&](const Product<T>& p) { return p.rows <= FEW_ROWS ? FEW_ROWS : 2 * k.rows; };
    const auto wide = [&](const Product<T>& p) {
      const int64_t tiles = std::max<int64_t>(1, ceil(p.columns, k.width));
      const int64_t least = ceil(tiles, p.rows <= FEW_ROWS ? 1 : k.group);
      const int64_t most = p.rows < 512 ? tiles : std::max(least, tiles / 4);
      return ceil(tiles, std::clamp(threads, least, most)) * k.width;
    };
    const auto units = [&](const Product<T>& p) { return ceil(p.rows, block(p)) * ceil(p.columns, wide(p)); };
    int64_t total = 0;
    double work = 0;  // in microseconds: of arithmetic, or of reading b
    for (const Product<T>& p : products_) {
      total += units(p);
      for (int64_t s = 0; s < p.count; s++)
        work += double(p.columns) * p.pieces[s].depth * std::max<double>(p.rows / 1e5, sizeof(T) / 1e4);
    }
    const int64_t grain = std::max<int64_t>(1, total * std::min(1.0, 10 / std::max(work, 1e-3)));
    at::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
      int64_t first = 0;
      for (const Product<T>& p : products_) {
        const int64_t from = std::max<int64_t>(begin - first, 0), to = std::min(end - first, units(p));
        first += units(p);
        const int64_t height = block(p), blocks = ceil(p.rows, height), columns = wide(p);
        for (int64_t unit = from, next; unit < to; unit = next) {  // row after row of the same columns
          const int64_t group = unit / blocks, column = group * columns;
          next = std::min(to, (group + 1) * blocks);
          k.multiply(p, unit % blocks * height, std::min(p.rows, ((next - 1) % blocks + 1) * height), column,
                     std::min(p.columns, column + columns));
        }
      }
    });
  }

 private:
  std::deque<Product<T>> products_;  // whose elements stay where they are
  std::deque<std::vector<Piece<T>>> pieces_;
};

int64_t length_of(const Numbers& spans) {
  int64_t m = 0;
  for (size_t i = 1; i < spans.size(); i += 2) m += spans[i];
  return m;
}

int64_t ranks_of(const Tensors& a) {
  int64_t ranks = 0;
  for (const Tensor& t : a) ranks = std::min(ranks + t.size(0), LARGEST + 1);
  return ranks;
}

// The kernels read what they are told to: everything is checked here
void check(const Layer& layer, int64_t n, at::ScalarType type) {
  const auto& [weight, bias, a, b, scales, spans] = layer;
  check_tensor(weight, 2, type, "W");
  check_tensor(bias, 1, type, "bias");
  TORCH_CHECK(n >= 1 && n <= weight.size(1), "x has ", n, " columns, W ", weight.size(1));
  TORCH_CHECK(!bias || bias->size(0) == weight.size(0), "the bias is not as long as W");
  TORCH_CHECK(a.size() == b.size() && a.size() == scales.size(), "stages without A, B or scale");
  for (size_t s = 0; s < a.size(); s++) {
    for (const Tensor& t : {a[s], b[s]}) check_tensor(t, 2, type, "A or B of a stage");
    TORCH_CHECK(a[s].size(1) >= n && b[s].size(0) == weight.size(0) && a[s].size(0) == b[s].size(1), "stage ", s,
                " of ", a[s].sizes(), " and ", b[s].sizes(), " does not fit W of ", weight.sizes());
  }
  TORCH_CHECK(ranks_of(a) <= LARGEST, "stages of ranks that are too large");
  TORCH_CHECK(spans.size() % 2 == 0, "spans: expected pairs");
  int64_t last = 0;  // of the rows before: each row is read once, or its gradient would be written twice
  for (size_t i = 0; i < spans.size(); last = spans[i] + spans[i + 1], i += 2)
    TORCH_CHECK(last <= spans[i] && spans[i] <= weight.size(0) && 0 <= spans[i + 1] &&
                    spans[i + 1] <= weight.size(0) - spans[i],  // the sum of two large numbers could be a small one
                "rows ", spans[i], " to ", spans[i], " + ", spans[i + 1], " of W of ", weight.sizes(),
                ", read up to ", last);
}

// a from its column `a_column`, b from (b_row, b_column), each transposed if `turned`
template <typename T>
Piece<T> piece(const Tensor& a, int64_t a_column, bool a_turned, const Tensor& b, int64_t b_row, int64_t b_column,
               bool b_turned, int64_t depth) {
  return {data<T>(a) + a_column * a.stride(1),
          a.stride(a_turned),
          a.stride(!a_turned),
          data<T>(b) + b_row * b.stride(0) + b_column * b.stride(1),
          b.stride(b_turned),
          b.stride(!b_turned),
          depth};
}

Tensor zeros_unless(bool whole, const Tensor& like) {
  return whole ? at::empty(like.sizes(), like.options()) : at::zeros(like.sizes(), like.options());
}

// Whether so many tokens pay for adding updates of W (m, n) to it while it is packed: it takes r · m · n steps, and
// multiplying with them apart r · rows · (m + n). What would not be packed without updates is not with them: updates of
// zeros leave every bit as it is.
bool pays_to_update(int64_t rows, int64_t m, int64_t n, const Numbers& spans, int64_t lanes) {
  for (size_t i = 1; i < spans.size(); i += 2)
    if (spans[i] <= lanes) return false;
  return rows > FEW_ROWS && rows * (m + n) > 2 * m * n;
}

// `linear_forward`; without h where `for_y_alone`
std::vector<Forward> forward(const Tensor& x, const std::vector<Layer>& layers, int64_t activation,
                             const Maybe& operand_, const Maybe& residual_, bool keep, bool for_y_alone) {
  at::NoGradGuard no_grad;
  check_tensor(x, 2, x.scalar_type(), "x");
  for (const Maybe& t : {operand_, residual_}) check_tensor(t, 2, x.scalar_type(), "operand or residual");
  check_activation(activation, operand_.has_value());
  const int64_t rows = x.size(0), n = x.size(1);
  const Maybe operand = rows_contiguous(operand_), residual = rows_contiguous(residual_);
  TORCH_CHECK(!layers.empty(), "a product takes a layer");
  TORCH_CHECK(layers.size() == 1 || (activation == NONE && !residual), "what follows the product is of one layer");
  keep = keep && activation != NONE;
  std::vector<Forward> out;
  Tensors biases;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "linear_forward", [&] {
    using T = scalar_t;
    Products<T> thin, products;
    std::deque<std::vector<T>> factors;
    for (const Layer& layer : layers) {
      check(layer, n, x.scalar_type());
      const auto& [weight, bias, a, b, scales, spans] = layer;
      const int64_t m = length_of(spans), ranks = ranks_of(a);
      for (const Maybe& t : {operand, residual})
        TORCH_CHECK(!t || (t->size(0) == rows && t->size(1) == m),
                    "operand or residual of ", t->sizes(), ", the product is of ", rows, " x ", m);
      const bool updates = for_y_alone && pays_to_update(rows, m, n, spans, kernels<T>().width / 2);
      const Tensor y = at::empty({rows, m}, x.options()), h = at::empty({updates ? 0 : rows, ranks}, x.options());
      const Tensor z = at::empty({keep ? rows : 0, m}, x.options());
      out.emplace_back(y, h, z);
      if (!y.numel()) {
        h.zero_();
        continue;
      }
      int64_t rank = 0;
      const std::vector<T>& factor = factors.emplace_back(scales.begin(), scales.end());
      for (size_t s = 0; s < a.size() && !updates; rank += a[s].size(0), s++)
        thin.add(rows, a[s].size(0), {piece<T>(x, 0, false, a[s], 0, 0, false, n)}, scales[s], data<T>(h) + rank,
                 ranks);
      if (bias) biases.push_back(bias->contiguous());
      int64_t column = 0;
      for (size_t i = 0; i < spans.size(); column += spans[i + 1], i += 2) {
        std::vector<Piece<T>> pieces = {piece<T>(x, 0, false, weight, spans[i], 0, false, n)};
        std::vector<Piece<T>> added;
        rank = 0;
        for (size_t s = 0; s < b.size(); rank += b[s].size(1), s++) {
          if (updates)
            added.push_back(piece<T>(a[s], 0, true, b[s], spans[i], 0, false, b[s].size(1)));
          else
            pieces.push_back(piece<T>(h, rank, false, b[s], spans[i], 0, false, b[s].size(1)));
        }
        Product<T>& p = products.add(rows, spans[i + 1], std::move(pieces), 1, data<T>(y) + column, m);
        if (updates) products.update(p, std::move(added), factor.data());
        p.activation = activation;
        if (bias) p.bias = data<T>(biases.back()) + spans[i];
        if (keep) p.z = data<T>(z) + column, p.z_stride = m;
        if (operand) p.operand = data<T>(operand) + column, p.operand_stride = operand->stride(0);
        if (residual) p.residual = data<T>(residual) + column, p.residual_stride = residual->stride(0);
      }
    }
    thin.run();
    products.run();
  });
  return out;
}

}  // namespace

std::vector<Forward> linear_forward(const Tensor& x, const std::vector<Layer>& layers, int64_t activation,
                                    const Maybe& operand, const Maybe& residual, bool keep) {
  return forward(x, layers, activation, operand, residual, keep, false);
}

Tensors linear_outputs(const Tensor& x, const std::vector<Layer>& layers, int64_t activation, const Maybe& operand,
                       const Maybe& residual) {
  Tensors out;
  for (Forward& one : forward(x, layers, activation, operand, residual, false, true)) out.push_back(std::get<0>(one));
  return out;
}

// (dx (T, n) or empty, each layer's [dA_s, dB_s of the stages that train]): of each layer dy (T, m), h of the forward pass.
std::tuple<Tensor, std::vector<Tensors>> linear_backward(const Tensors& dys, const Maybe& x, const std::vector<Maybe>& hs,
                                                         const std::vector<Layer>& layers,
                                                         const std::vector<std::vector<bool>>& trains, bool needs_dx,
                                                         int64_t n) {
  at::NoGradGuard no_grad;
  TORCH_CHECK(dys.size() == layers.size() && hs.size() == layers.size() && trains.size() == layers.size() &&
                  !layers.empty(),
              "linear_backward: lists of different lengths");
  for (const Tensor& dy : dys) check_tensor(dy, 2, dys[0].scalar_type(), "dy");
  check_tensor(x, 2, dys[0].scalar_type(), "x");
  for (const Maybe& h : hs) check_tensor(h, 2, dys[0].scalar_type(), "h");
  TORCH_CHECK(n >= 1, "x has no columns");
  const int64_t rows = dys[0].size(0);
  const Tensor dx = at::empty({needs_dx ? rows : 0, n}, dys[0].options());
  std::vector<Tensors> gradients(layers.size());
  AT_DISPATCH_FLOATING_TYPES(dx.scalar_type(), "linear_backward", [&] {
    using T = scalar_t;
    Products<T> thin, products;
    std::vector<Piece<T>> whole;
    Tensors kept;
    std::vector<std::pair<Tensor, Tensor>> turn;
    for (size_t l = 0; l < layers.size(); l++) {
      check(layers[l], n, dx.scalar_type());
      const auto& [weight, bias, a, b, scales, spans] = layers[l];
      const Tensor& dy = dys[l];
      const int64_t m = length_of(spans), ranks = ranks_of(a);
      TORCH_CHECK(dy.size(0) == rows && dy.size(1) == m && trains[l].size() == a.size(),
                  "gradient of ", dy.sizes(), ", the product was of ", rows, " x ", m);
      const Tensor g = at::empty({rows, ranks}, dy.options());
      kept.push_back(g);
      int64_t column = 0;
      for (size_t i = 0; i < spans.size(); column += spans[i + 1], i += 2)
        if (needs_dx) whole.push_back(piece<T>(dy, column, false, weight, spans[i], 0, true, spans[i + 1]));
      int64_t rank = 0;
      for (size_t s = 0; s < a.size(); rank += a[s].size(0), s++) {
        if (!needs_dx && !trains[l][s]) continue;
        std::vector<Piece<T>> pieces;
        column = 0;
        for (size_t i = 0; i < spans.size(); column += spans[i + 1], i += 2)
          pieces.push_back(piece<T>(dy, column, false, b[s], spans[i], 0, true, spans[i + 1]));
        thin.add(rows, a[s].size(0), std::move(pieces), scales[s], data<T>(g) + rank, ranks);
        if (needs_dx) whole.push_back(piece<T>(g, rank, false, a[s], 0, 0, true, a[s].size(0)));
        if (!trains[l][s]) continue;
        const auto fits = [&](const Maybe& t, int64_t columns) {
          return t && t->size(0) == rows && t->size(1) == columns;
        };
        TORCH_CHECK(fits(x, n) && fits(hs[l], ranks), "a stage trains: its gradient takes x and h");
        const Tensor da = zeros_unless(n == a[s].size(1) && rows, a[s]), db = zeros_unless(m == b[s].size(0) && rows, b[s]);
        gradients[l].push_back(da), gradients[l].push_back(db);
        if (!rows) continue;
        products.add(a[s].size(0), n, {piece<T>(g, rank, true, *x, 0, 0, true, rows)}, 1, data<T>(da), da.stride(0));
        const Tensor turned = at::empty({a[s].size(0), m}, dy.options());  // reads dy by lines, not by numbers
        thin.add(a[s].size(0), m, {piece<T>(*hs[l], rank, true, dy, 0, 0, true, rows)}, 1, data<T>(turned), m);
        column = 0;
        for (size_t i = 0; i < spans.size(); column += spans[i + 1], i += 2)
          turn.emplace_back(db.narrow(0, spans[i], spans[i + 1]), turned.narrow(1, column, spans[i + 1]).t());
      }
    }
    if (needs_dx) products.add(rows, n, std::move(whole), 1, data<T>(dx), n);
    thin.run();
    products.run();
    for (auto& [to, from] : turn) to.copy_(from);
  });
  return {dx, gradients};
}

// out (rows, columns) = a (rows, depth) · bᵀ (columns, depth) + bias, of any strides; the rows of out lie side by side
Tensor product(const Tensor& a, const Tensor& b, const Maybe& bias, const Tensor& out) {
  at::NoGradGuard no_grad;
  for (const Tensor& t : {a, b, out}) check_tensor(t, 2, a.scalar_type(), "factors or result of a product");
  check_tensor(bias, 1, a.scalar_type(), "bias");
  TORCH_CHECK(a.size(1) == b.size(1) && out.size(0) == a.size(0) &&
                  out.size(1) == b.size(0) && (!bias || bias->numel() == b.size(0)) &&
                  (out.stride(1) == 1 || out.size(1) <= 1),
              "product of ", a.sizes(), " and ", b.sizes(), " to ", out.sizes());
  at::assert_no_internal_overlap(out), at::assert_no_overlap(out, a), at::assert_no_overlap(out, b);
  const Maybe shift = contiguous(bias);
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "product", [&] {
    Products<scalar_t> one;
    one.add(a.size(0), b.size(0), {piece<scalar_t>(a, 0, false, b, 0, 0, false, a.size(1))}, 1, data<scalar_t>(out),
            out.stride(0))
        .bias = data<scalar_t>(shift);
    one.run();
  });
  return out;
}

// The forward pass alone; x, y, operand and residual may have any leading dimensions
Tensors linear(const Tensor& x, const std::vector<Layer>& layers, int64_t activation, const Maybe& operand,
               const Maybe& residual) {
  TORCH_CHECK(x.dim() > 0, "x has no columns");
  const int64_t n = x.size(-1);
  const auto flat = [](const Maybe& t) { return t ? Maybe(t->reshape({-1, t->size(-1)})) : t; };
  TORCH_CHECK(n > 0, "x has no columns");
  for (const Maybe& t : {operand, residual})
    TORCH_CHECK(!t || (t->dim() == x.dim() && t->sizes().slice(0, x.dim() - 1) == x.sizes().slice(0, x.dim() - 1)),
                "operand or residual of ", t->sizes(), ", x is of ", x.sizes());
  Tensors out = linear_outputs(x.reshape({-1, n}), layers, activation, flat(operand), flat(residual));
  for (Tensor& y : out) {
    std::vector<int64_t> shape = x.sizes().vec();
    shape.back() = y.size(1);
    y = y.view(shape);
  }
  return out;
}

}  // namespace mlfs
