// The CPU's operators: they check their arguments and divide the work of products.cpp among threads.

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <string>
#include <utility>

#include "products.h"
#include "threads.h"

namespace {

constexpr int64_t MAX_ROWS = 16;       // rows of x; more are a prefill
constexpr int64_t ROWS_AT_ONCE = 256;  // rows of x in a prefill: as many as the cache holds beside a panel
constexpr int64_t FAR = 1LL << 40;     // positions and windows from here on are the same: no cache is as long
constexpr int64_t SCRATCH = 1 << 20;   // elements of the weight that are unpacked at a time for at::mm

Kernels chosen = available().front();

int64_t panels(int64_t N) { return (N + LANES - 1) / LANES; }

// In place of at::empty, whose header would take a sixth of this file's compile time.
at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype = at::kBFloat16) { return at::detail::empty_cpu(sizes, dtype); }

// y = x W^T for many rows: unpacks as many panels as the cache holds to rows of bf16, calls at::mm, and so on.
void by_matrices(Kind kind, const Call& c, const at::Tensor& x, at::Tensor& y) {
  const int64_t bytes = panel_bytes(kind, c.K, c.G), at_once = std::max<int64_t>(1, SCRATCH / (LANES * std::max<int64_t>(1, c.K)));
  at::Tensor scratch = empty({std::min(at_once, panels(c.N)) * LANES, c.K});
  bf16* rows = static_cast<bf16*>(scratch.data_ptr());
  const int threads = omp_get_max_threads();  // oneDNN divides x.mm among as many, and in a step there is one
  if (leader.in_step) omp_set_num_threads(1);
  for (int64_t p = 0; p < panels(c.N); p += at_once) {
    const int64_t n = std::min(at_once, panels(c.N) - p);
    at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) chosen.unpack[kind](c, c.w + (p + i) * bytes, rows + i * LANES * c.K);
    });
    const int64_t n_rows = std::min(n * LANES, c.N - p * LANES);
    y.narrow(1, p * LANES, n_rows).copy_(x.mm(scratch.narrow(0, 0, n_rows).t()));
  }
  omp_set_num_threads(threads);
}

struct Inputs {  // what `Call::inputs` and `Call::groups` point to
  std::vector<bf16> inputs;
  std::vector<Group> groups;
};

Inputs arrange(Kind kind, const Call& c) {
  const bool rounds = of_integers(kind) && chosen.round;
  std::vector<bf16> inputs(c.M > 1 || rounds ? c.M * c.K : 0);
  std::vector<Group> groups(of_integers(kind) ? c.M * n_groups(c.K, c.G) : 0);
  for (int64_t first = 0; first < c.M; first += chosen.rows_at_once) {
    const int64_t n = std::min(chosen.rows_at_once, c.M - first);
    for (int64_t m = 0; m < n; ++m) {
      const bf16* x = c.x + (first + m) * c.K;
      Group* row = groups.data() + (first + m) * n_groups(c.K, c.G);
      if (rounds) {
        chosen.round(x, c.K, c.G, n, row, reinterpret_cast<int8_t*>(&inputs[first * c.K]) + 8 * m);
        continue;
      }
      for (int64_t i = 0; i < c.K / 2 && c.M > 1; ++i) std::memcpy(&inputs[first * c.K + 2 * (i * n + m)], x + 2 * i, 4);
      for (int64_t g = 0; g < c.K && of_integers(kind); g += c.G, ++row)
        for (int64_t i = g; i < std::min(c.K, g + c.G); ++i) row->sum += to_float(x[i]);
    }
  }
  return {std::move(inputs), std::move(groups)};
}

// Calls of the same sizes, but for the rows; their panels are shared out together. Calls `put(c, panel, out)` with results.
template <class Put>
void few_rows(Kind kind, std::vector<Call> calls, const Put& put) {
  if (calls.empty()) return;
  std::vector<Inputs> arranged;
  for (Call& c : calls) {
    const bool again = &c != calls.data() && c.x == (&c)[-1].x && c.M == 1;  // a token's row, for its next expert
    if (!again) arranged.push_back(arrange(kind, c));
    c.inputs = arranged.back().inputs.empty() ? c.x : arranged.back().inputs.data();
    c.groups = arranged.back().groups.data();
  }
  const int64_t n = panels(calls[0].N), bytes = panel_bytes(kind, calls[0].K, calls[0].G);
  share_out(calls.size() * n, [&](int64_t i) {
    float out[MAX_ROWS * LANES];
    const Call& c = calls[i / n];
    chosen.few_rows[kind](c, c.w + i % n * bytes, out);
    put(c, i % n, out);
  });
}

void many_rows(Kind kind, Call c) {
  const int64_t n_rows = c.M;
  for (int64_t first = 0; first < n_rows; first += ROWS_AT_ONCE, c.x += c.M * c.K, c.y += c.M * c.N) {
    c.M = std::min(n_rows - first, ROWS_AT_ONCE);
    share_out((panels(c.N) + 1) / 2, [&](int64_t i) { chosen.many_rows[kind](c, 2 * i, std::min(2 * i + 2, panels(c.N))); });
  }
}

// Calls `work(m)` for every row m; few rows are not worth a second thread.
template <class Work>
void by_rows(int64_t n_rows, int64_t columns, const Work& work) {
  at::parallel_for(0, n_rows, 32768 / std::clamp<int64_t>(columns, 1, 32768), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) work(m);
  });
}

// What an operator does before and after the product; see `Product` in kernels/__init__.py.
struct Fused {
  const std::optional<at::Tensor>&bias, &norm;  // [N], [K]
  double eps;
  const std::optional<at::Tensor>& residual;  // [M, N]
  const std::string& activation;  // "", "silu" or "gelu_tanh"
  const std::optional<at::Tensor>&experts, &weights;  // [T, k]
};

// Multiplies each row of x with the weights of its token's experts, or, of `k` rows a token, of one expert each; y [T k, N].
void by_experts(Kind kind, const Call& c, const at::Tensor& x, const at::Tensor& experts, int64_t n_experts) {
  const int64_t M = experts.numel(), per_row = M / std::max<int64_t>(1, x.size(0));
  const int64_t bytes = panels(c.N) * panel_bytes(kind, c.K, c.G);
  const int64_t* chosen_by = static_cast<const int64_t*>(experts.const_data_ptr());
  std::vector<int64_t> begins(n_experts + 1), order(M);
  for (int64_t i = 0; i < M; ++i) {
    TORCH_CHECK(chosen_by[i] >= 0 && chosen_by[i] < n_experts, "expert ", chosen_by[i], " of ", n_experts);
    ++begins[chosen_by[i] + 1];
  }
  std::vector<Call> few;
  const auto with_expert = [&](int64_t e, int64_t rows, const bf16* from, bf16* to) {
    Call call = c;
    call.w += e * bytes, call.M = rows, call.x = from, call.y = to;
    return call;
  };
  if (experts.size(0) == 1) {  // each expert has one row
    for (int64_t i = 0; i < M; ++i) few.push_back(with_expert(chosen_by[i], 1, c.x + i / per_row * c.K, c.y + i * c.N));
    return few_rows(kind, std::move(few), store);
  }
  for (int64_t e = 0; e < n_experts; ++e) begins[e + 1] += begins[e];
  std::vector<int64_t> next(begins.begin(), begins.end() - 1);
  for (int64_t i = 0; i < M; ++i) order[next[chosen_by[i]]++] = i;
  at::Tensor from = empty({M, c.K}), to = empty({M, c.N});  // rows of the same expert together
  bf16 *gathered = static_cast<bf16*>(from.data_ptr()), *results = static_cast<bf16*>(to.data_ptr());
  by_rows(M, c.K, [&](int64_t i) { std::memcpy(gathered + i * c.K, c.x + order[i] / per_row * c.K, 2 * c.K); });
  for (int64_t e = 0; e < n_experts; ++e) {
    const int64_t begin = begins[e], rows = begins[e + 1] - begin;
    const Call call = with_expert(e, rows, gathered + begin * c.K, results + begin * c.N);
    if (rows > MAX_ROWS && chosen.many_rows[kind]) {
      many_rows(kind, call);
    } else if (rows > MAX_ROWS) {
      at::Tensor part = to.narrow(0, begin, rows);
      by_matrices(kind, call, from.narrow(0, begin, rows), part);
    } else if (rows) {
      few.push_back(call);
    }
  }
  few_rows(kind, std::move(few), store);
  by_rows(M, c.N, [&](int64_t i) { std::memcpy(c.y + order[i] * c.N, results + i * c.N, 2 * c.N); });
}

// The sizes of x [M, K] and of a packed weight [N, K], or one such for each expert, in bytes each, if the two fit.
struct Sizes {
  int64_t M, K, bytes, n_experts;
};
Sizes check(Kind kind, const at::Tensor& x, const at::Tensor& packed, int64_t N, int64_t G, bool of_experts = false) {
  TORCH_CHECK(x.dim() == 2 && x.scalar_type() == at::kBFloat16, "x must be bfloat16 [M, K], not ", x.scalar_type(), " ", x.sizes());
  const int64_t M = x.size(0), K = x.size(1), multiple = kind == BF16 ? 2 : kind == INT8 ? 4 : G;
  TORCH_CHECK(N >= 0 && N <= INT32_MAX && K <= INT32_MAX, N, " outputs of ", K, " inputs are not possible");
  TORCH_CHECK(K % multiple == 0, K, " inputs are not a multiple of ", multiple);
  TORCH_CHECK(packed.scalar_type() == at::kByte, "the weight is ", packed.scalar_type(), ", not packed in bytes");
  const int64_t bytes = panels(N) * panel_bytes(kind, K, G);
  const int64_t n_experts = of_experts && bytes ? std::max<int64_t>(1, int64_t(packed.nbytes()) / bytes) : 1;
  TORCH_CHECK(packed.is_contiguous() && int64_t(packed.nbytes()) == n_experts * bytes, "the weight has ", packed.nbytes(),
              " bytes, not ", n_experts * bytes);
  return {M, K, bytes, n_experts};
}

const bf16* bf16_data(const at::Tensor& x, at::IntArrayRef sizes, const char* name) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && x.is_contiguous() && x.sizes() == sizes, name, " must be bfloat16 ", sizes,
              ", contiguous, not ", x.scalar_type(), " ", x.sizes());
  return static_cast<const bf16*>(x.const_data_ptr());
}

at::Tensor normalized(const at::Tensor& x, const at::Tensor& norm, double eps) {
  const int64_t K = x.size(1);
  const bool is_bf16 = norm.scalar_type() != at::kFloat;
  const void* weight = is_bf16 ? bf16_data(norm, {K}, "the norm") : norm.const_data_ptr();
  TORCH_CHECK(is_bf16 || (norm.is_contiguous() && norm.sizes() == at::IntArrayRef(K)), "the norm must have ", K, " weights");
  at::Tensor y = empty(x.sizes());
  const bf16* from = static_cast<const bf16*>(x.const_data_ptr());
  bf16* to = static_cast<bf16*>(y.data_ptr());
  by_rows(x.size(0), K, [&](int64_t m) { chosen.normalize(from + m * K, weight, is_bf16, float(eps), K, to + m * K); });
  return y;
}

// The k most probable of E experts for every row of x [T, K], after an RMSNorm, and their probabilities, both [T, k].
std::tuple<at::Tensor, at::Tensor> route(const at::Tensor& x_any, const at::Tensor& packed, int64_t E, int64_t k, bool normalizes,
                                         const at::Tensor& norm, double eps) {
  const auto [T, K, bytes, n_experts] = check(BF16, x_any, packed, E, 1);
  TORCH_CHECK(k >= 0 && k <= E && K > 0, k, " of ", E, " experts cannot be chosen by ", K, " inputs");
  const at::Tensor x = normalized(x_any.contiguous(), norm, eps);
  at::Tensor experts = empty({T, k}, at::kLong), weights = empty({T, k}, at::kFloat);
  const bf16* rows = static_cast<const bf16*>(x.const_data_ptr());
  int64_t* ids = static_cast<int64_t*>(experts.data_ptr());
  float* shares = static_cast<float*>(weights.data_ptr());
  if (!experts.numel()) return {experts, weights};
  std::vector<float> scores(T * E);
  std::vector<Call> calls;
  for (int64_t t = 0; t < T; t += MAX_ROWS)
    calls.push_back({rows + t * K, static_cast<const uint8_t*>(packed.const_data_ptr()), nullptr, nullptr, nullptr,
                     std::min(MAX_ROWS, T - t), E, K, 1});
  if (leader.in_step) leader.team->multiplies(packed, packed.nbytes());
  few_rows(BF16, std::move(calls), [&](const Call& c, int64_t panel, const float* out) {
    float* to = scores.data() + (c.x - rows) / K * E + panel * LANES;
    for (int64_t m = 0; m < c.M; ++m) std::memcpy(to + m * E, out + m * LANES, 4 * std::min(LANES, E - panel * LANES));
  });
  by_rows(T, 32 * E, [&](int64_t t) {
    float *row = scores.data() + t * E, *share = shares + t * k, total = 0, of_chosen = 0;
    const float top = *std::max_element(row, row + E);
    for (int64_t e = 0; e < E; ++e) total += row[e] = std::exp(row[e] - top);
    for (int64_t j = 0; j < k; ++j) {
      float* best = std::max_element(row, row + E);
      ids[t * k + j] = best - row, of_chosen += share[j] = std::exchange(*best, -1.f);
    }
    for (int64_t j = 0; j < k; ++j) share[j] /= normalizes ? of_chosen : total;
  });
  return {experts, weights};
}

at::Tensor multiply(Kind kind, const at::Tensor& x_any, const at::Tensor& packed, int64_t N, int64_t G, const Fused& fused,
                    Pairs pairs = {}) {
  const auto [n_rows, K, bytes, n_experts] = check(kind, x_any, packed, N, G, fused.experts.has_value());
  int64_t M = n_rows;
  at::Tensor experts, weights;
  if (fused.experts) {
    experts = fused.experts->contiguous();
    TORCH_CHECK(experts.dim() == 2 && experts.scalar_type() == at::kLong && N % LANES == 0 && !fused.bias,
                "experts must be int64 [T, k], and have a multiple of 16 outputs, without a bias");
    TORCH_CHECK(M == (fused.weights ? experts.numel() : experts.size(0)), M, " rows of x for experts ", experts.sizes());
    M = experts.numel();
  }
  if (fused.weights) {
    weights = fused.weights->contiguous();
    TORCH_CHECK(fused.experts && weights.scalar_type() == at::kFloat && weights.sizes() == experts.sizes(),
                "the experts' weights must be float32 [T, k]");
  }
  const bool gelu = fused.activation == "gelu_tanh", gated = gelu || fused.activation == "silu";
  TORCH_CHECK(gated || fused.activation.empty(), "the activation is silu or gelu_tanh, not ", fused.activation);
  TORCH_CHECK(!gated || (N % 2 == 0 && !fused.residual && !fused.weights), "gates need an even number of outputs, not ", N, ", with no residual");
  at::Tensor x = x_any.contiguous(), y = empty({M, N});
  if (fused.norm) x = normalized(x, *fused.norm, fused.eps);
  bf16* out = static_cast<bf16*>(y.data_ptr());
  const Call c{static_cast<const bf16*>(x.const_data_ptr()), static_cast<const uint8_t*>(packed.const_data_ptr()), out,
               nullptr, nullptr, M, N, K, G, pairs};
  if (leader.in_step && fused.experts)
    leader.team->multiplies(packed, bytes, static_cast<const int64_t*>(experts.const_data_ptr()), M == experts.size(1) ? M : 0);
  else if (leader.in_step)
    leader.team->multiplies(packed, packed.nbytes());
  if (fused.experts)
    by_experts(kind, c, x, experts, n_experts);
  else if (M <= MAX_ROWS)
    few_rows(kind, {c}, store);
  else if (chosen.many_rows[kind])
    many_rows(kind, c);
  else
    by_matrices(kind, c, x, y);
  if (fused.bias) {
    const bf16* bias = bf16_data(*fused.bias, {N}, "the bias");
    by_rows(M, N, [&](int64_t m) { chosen.add(bias, N, out + m * N); });
  }
  if (fused.weights) {
    const int64_t k = experts.size(1), T = experts.size(0);
    const float* weight = static_cast<const float*>(weights.const_data_ptr());
    const at::Tensor each = std::exchange(y, empty({T, N}));
    bf16* sums = static_cast<bf16*>(y.data_ptr());
    by_rows(T, k * N, [&](int64_t t) { chosen.mix(out + t * k * N, weight + t * k, k, N, sums + t * N); });
    out = sums, M = T;
  }
  if (fused.residual) {
    const bf16* residual = bf16_data(*fused.residual, {M, N}, "the residual");
    by_rows(M, N, [&](int64_t m) { chosen.add(residual + m * N, N, out + m * N); });
  }
  if (!gated) return y;
  at::Tensor products = empty({M, N / 2});
  bf16* to = static_cast<bf16*>(products.data_ptr());
  by_rows(M, N, [&](int64_t m) { chosen.gate(out + m * N, N / 2, gelu, to + m * (N / 2)); });
  return products;
}

using Maybe = std::optional<at::Tensor>;
at::Tensor bf16_linear(const at::Tensor& x, const at::Tensor& packed, int64_t N, const Maybe& bias, const Maybe& norm, double eps,
                       const Maybe& residual, std::string activation, const Maybe& experts, const Maybe& weights) {
  return multiply(BF16, x, packed, N, 32, {bias, norm, eps, residual, activation, experts, weights});
}
at::Tensor int8_linear(const at::Tensor& x, const at::Tensor& packed, int64_t N, const Maybe& bias, const Maybe& norm, double eps,
                       const Maybe& residual, std::string activation, const Maybe& experts, const Maybe& weights) {
  return multiply(INT8, x, packed, N, INPUTS_PER_SCALE, {bias, norm, eps, residual, activation, experts, weights});
}
// form: the kind of the pairs, plus 8 for 8 bits; 16: FP8. (In one number: an operator's argument takes 0.2 us.)
at::Tensor grouped_linear(const at::Tensor& x, const at::Tensor& packed, int64_t N, int64_t G, int64_t form, const Maybe& bias,
                          const Maybe& norm, double eps, const Maybe& residual, std::string activation, const Maybe& experts,
                          const Maybe& weights) {
  TORCH_CHECK(G > 0 && G % 16 == 0 && INPUTS_PER_SCALE % G == 0 && x.size(-1) % G == 0, x.size(-1),
              " inputs cannot be divided into groups of ", G, ", which must be a multiple of 16 and divide ", INPUTS_PER_SCALE);
  TORCH_CHECK(form == 16 || (form > 0 && form < 16 && form % 4), "there is no form ", form, " of weights in groups");
  return multiply(form == 16 ? FP8 : form < 8 ? GROUPS4 : GROUPS8, x, packed, N, G, {bias, norm, eps, residual, activation, experts, weights},
                  {form / 4 % 2 == 1, Zeros(form % 4)});
}

// Packs rows of bf16 [N, K] into panels, by transposing squares of 16 x 16 pairs; the last panel is padded with zeros.
void pack_bf16(const at::Tensor& weight, at::Tensor& out) {
  TORCH_CHECK(weight.dim() == 2 && weight.scalar_type() == at::kBFloat16 && weight.is_contiguous() && weight.size(1) % 2 == 0,
              "the weight must be contiguous bfloat16 [N, K] with an even K");
  const int64_t N = weight.size(0), K = weight.size(1), n_pairs = K / 2;
  TORCH_CHECK(out.scalar_type() == at::kByte && out.is_contiguous() && N <= INT32_MAX && K <= INT32_MAX &&
              int64_t(out.nbytes()) == panels(N) * panel_bytes(BF16, K, 1), "the panels must be contiguous bytes, not ",
              out.scalar_type(), " ", out.sizes());
  const uint32_t* rows = static_cast<const uint32_t*>(weight.const_data_ptr());
  uint32_t* packed = static_cast<uint32_t*>(out.data_ptr());
  at::parallel_for(0, panels(N), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      for (int64_t i = 0; i < n_pairs; i += 16) {
        const int64_t n = std::min<int64_t>(16, n_pairs - i), n_rows = std::min(LANES, N - p * LANES);
        uint32_t square[LANES][16] = {};
        for (int64_t r = 0; r < n_rows; ++r) std::memcpy(square[r], rows + (p * LANES + r) * n_pairs + i, 4 * n);
        uint32_t* to = packed + (p * n_pairs + i) * LANES;
        for (int64_t j = 0; j < n; ++j)
          for (int64_t r = 0; r < LANES; ++r) to[j * LANES + r] = square[r][j];
      }
  });
}

// Combines the partial results of row m, each with best, total and out [P], into y [D].
void combine_parts(const Attention& c, const std::vector<int64_t>& parts, int64_t m, const float* best, const float* total,
                   const float* out, bf16* y) {
  float greatest = -INFINITY, sum = 0;
  for (int64_t i : parts) greatest = std::max(greatest, best[i * c.M + m]);
  std::vector<float> values(c.D);
  for (int64_t i : parts) {
    if (total[i * c.M + m] == 0) continue;  // the row sees nothing of it; of scores that are NaN the total is NaN
    const float factor = std::exp2(best[i * c.M + m] - greatest);
    sum += factor * total[i * c.M + m];
    for (int64_t d = 0; d < c.D; ++d) values[d] += factor * out[(i * c.M + m) * c.P + d];
  }
  for (int64_t d = 0; d < c.D; ++d) y[d] = to_bf16(sum ? values[d] / sum : 0.f);
}

// The chunks of all key heads, one head after the other, are cut into equal pieces, one per thread. The part of head h
// in piece t has the number t + h. That is unique: from one part to the next t or h grows, and neither falls.
void attend(const Attention& c, int64_t B, bool is_int8, bf16* y) {
  const int64_t n_heads = B * c.KV;
  std::vector<int64_t> begins(B), ends(B), units(n_heads + 1);
  for (int64_t h = 0; h < n_heads; ++h) {
    const int64_t b = h / c.KV, *at = c.positions + b * c.S;
    ends[b] = std::clamp<int64_t>(*std::max_element(at, at + c.S) + 1, 1, c.L);
    begins[b] = c.window ? std::clamp<int64_t>(*std::min_element(at, at + c.S) + 1 - c.window, 0, ends[b] - 1) : 0;
    units[h + 1] = units[h] + (ends[b] - begins[b] + CHUNK - 1) / CHUNK;
  }
  const int64_t n_pieces = std::min<int64_t>(units[n_heads], at::get_num_threads()), n_parts = n_pieces + n_heads - 1;
  at::Tensor found = empty({n_parts * c.M * (c.P + 2)}, at::kFloat);
  float *best = static_cast<float*>(found.data_ptr()), *total = best + n_parts * c.M, *out = total + n_parts * c.M;
  const auto part = [&](int64_t t, int64_t h) {  // its range of chunks, counted from the head's first
    const int64_t from = std::max(units[h], units[n_heads] * t / n_pieces);
    return std::pair(from - units[h], std::min(units[h + 1], units[n_heads] * (t + 1) / n_pieces) - units[h]);
  };
  share_out(n_pieces, [&](int64_t t) {
    for (int64_t h = 0; h < n_heads; ++h)
      if (const auto [from, until] = part(t, h); from < until) {
        const int64_t b = h / c.KV, i = (t + h) * c.M;
        const int64_t begin = begins[b] + from * CHUNK, end = std::min(begins[b] + until * CHUNK, ends[b]);
        chosen.attend[is_int8](c, b, h % c.KV, begin, end, best + i, total + i, out + i * c.P);
      }
  });
  for (int64_t h = 0; h < n_heads; ++h) {
    std::vector<int64_t> parts;
    for (int64_t t = 0; t < n_pieces; ++t)
      if (const auto [from, until] = part(t, h); from < until) parts.push_back(t + h);
    for (int64_t m = 0; m < c.M; ++m) combine_parts(c, parts, m, best, total, out, y + (h * c.M + m) * c.D);
  }
}

// Attention of q [B, H, S, D] at positions [B, S] over k, v [B, KV, L, D], views of a cache in bf16, or in int8 with
// scales [B, KV, L]. A query sees the slots up to its position; with a window, only so many of them. Result: as q.
at::Tensor decode_attention(const at::Tensor& q_any, const at::Tensor& k, const at::Tensor& v, const at::Tensor& positions_any,
                            int64_t window, const std::optional<at::Tensor>& k_scales, const std::optional<at::Tensor>& v_scales) {
  TORCH_CHECK(chosen.attend[0], "attention needs AVX-512 with bf16");
  TORCH_CHECK(q_any.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v must have four dimensions");
  const int64_t B = q_any.size(0), H = q_any.size(1), S = q_any.size(2), D = q_any.size(3), KV = k.size(1), L = k.size(2);
  const bool is_int8 = k.scalar_type() == at::kChar;
  TORCH_CHECK(q_any.scalar_type() == at::kBFloat16 && (is_int8 || k.scalar_type() == at::kBFloat16) && v.scalar_type() == k.scalar_type(),
              "q must be bfloat16, k and v too or both int8");
  TORCH_CHECK(k.sizes() == v.sizes() && k.size(0) == B && k.size(3) == D && KV > 0 && L > 0 && H % KV == 0,
              "k and v of shape ", k.sizes(), " and ", v.sizes(), " do not fit q of shape ", q_any.sizes());
  TORCH_CHECK(positions_any.scalar_type() == at::kLong && positions_any.sizes() == at::IntArrayRef({B, S}),
              "positions must be int64 [B, S]");
  TORCH_CHECK(k.stride(3) == 1 && v.stride(3) == 1, "a head must be contiguous");
  TORCH_CHECK(window >= 0, "a window of ", window, " slots is not possible");
  at::Tensor y = empty({B, H, S, D});
  if (!y.numel()) return y;
  Attention c{};
  TORCH_CHECK(is_int8 == k_scales.has_value() && is_int8 == v_scales.has_value(), "int8 keys and values need scales, others take none");
  if (is_int8) {
    for (const at::Tensor& scales : {*k_scales, *v_scales})
      TORCH_CHECK(scales.scalar_type() == at::kFloat && scales.sizes() == at::IntArrayRef({B, KV, L}) && scales.stride(2) == 1 &&
                  scales.strides() == k_scales->strides(), "scales must be float32 [B, KV, L], laid out alike");
    c.k_scales = static_cast<const float*>(k_scales->const_data_ptr()), c.v_scales = static_cast<const float*>(v_scales->const_data_ptr());
    c.scale_strides[0] = k_scales->stride(0), c.scale_strides[1] = k_scales->stride(1);
  }
  const at::Tensor q = q_any.contiguous(), positions = positions_any.contiguous();
  const int64_t* given = static_cast<const int64_t*>(positions.const_data_ptr());
  std::vector<int64_t> places(given, given + B * S);
  for (int64_t& position : places) position = std::clamp<int64_t>(position, -1, FAR);
  c.q = static_cast<const bf16*>(q.const_data_ptr()), c.k = k.const_data_ptr(), c.v = v.const_data_ptr();
  c.positions = places.data(), c.window = std::min(window, FAR);
  c.KV = KV, c.M = H / KV * S, c.S = S, c.L = L, c.D = D, c.P = (D + 31) / 32 * 32;
  for (int i = 0; i < 3; ++i) c.k_strides[i] = k.stride(i), c.v_strides[i] = v.stride(i);
  c.scale = 1.44269504f / std::sqrt(float(D));
  attend(c, B, is_int8, static_cast<bf16*>(y.data_ptr()));
  return y;
}

std::vector<std::string> variants() {
  std::vector<std::string> names;
  for (const Kernels& kernels : available()) names.push_back(kernels.name);
  return names;
}

void choose_variant(const std::string& name) {
  for (const Kernels& kernels : available())
    if (name == kernels.name) {
      chosen = kernels;
      return;
    }
  TORCH_CHECK(false, "this processor does not run ", name);
}

}  // namespace

TORCH_LIBRARY(fast, m) {
  m.def("pack_bf16(Tensor weight, Tensor(a!) out) -> ()");
  const std::string fused = ", Tensor? bias=None, Tensor? norm=None, float eps=0, Tensor? residual=None, str activation=\"\", "
                            "Tensor? experts=None, Tensor? weights=None) -> Tensor";
  m.def(("bf16_linear(Tensor x, Tensor packed, int n_out" + fused).c_str());
  m.def(("int8_linear(Tensor x, Tensor packed, int n_out" + fused).c_str());
  m.def(("grouped_linear(Tensor x, Tensor packed, int n_out, int groupsize, int form" + fused).c_str());
  m.def("route(Tensor x, Tensor packed, int n_experts, int k, bool normalizes, Tensor norm, float eps) -> (Tensor, Tensor)");
  m.def("decode_attention(Tensor q, Tensor k, Tensor v, Tensor positions, int window=0, Tensor? k_scales=None, "
        "Tensor? v_scales=None) -> Tensor");
  m.def("variants() -> str[]", variants);
  m.def("choose_variant(str name) -> ()", choose_variant);
}

TORCH_LIBRARY_IMPL(fast, CPU, m) {
  m.impl("pack_bf16", pack_bf16);
  m.impl("int8_linear", int8_linear);
  m.impl("grouped_linear", grouped_linear);
  m.impl("bf16_linear", bf16_linear);
  m.impl("route", route);
  m.impl("decode_attention", decode_attention);
}
