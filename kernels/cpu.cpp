// Products of a few rows with bf16, int8 and int4 weights on a CPU, at the speed at which memory delivers the weights.
//
// Quantised weights lie in panels of 16 rows, one row per lane: a register of weights meets a broadcast input, and no sum
// runs across lanes. Each thread reads one stream of panels from its first byte to its last, the scales inside it. Up to
// 8 rows of x share what is read of a panel, 16 take it twice, the second time from the cache; with more rows (prefill)
// a panel is first unpacked to bf16, or without AVX-512 a cache's worth of panels to plain rows for at::mm.
//
// A panel of int8:  K/2 times 32 bytes: row r's inputs 2i, 2i+1 at 2r, 2r+1.  Then 16 float32 scales.
// A panel of int4:  K/8 times 16 words of 32 bits, row r's in word r: inputs 0, 2, 4, 6 in its low half from the lowest
//                   four bits up, inputs 1, 3, 5, 7 in its high half.  After each group 16 pairs of bf16, (scale, zero).
// bf16 weights are plain rows [N, K]: a dot product each.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace {

constexpr int64_t LANES = 16;
constexpr int64_t MAX_ROWS = 16;           // of x; above it is a prefill
constexpr int64_t ROWS_AT_ONCE = 256;      // of x in a prefill: what the cache holds beside a panel
constexpr int64_t SCRATCH = 1 << 20;       // elements of the weight that at::mm gets at a time
constexpr int64_t CHUNK = 256;             // slots of a cache at a time; 512 would overflow a sum of int8 values
using bf16 = uint16_t;

inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

inline bf16 to_bf16(float x) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bf16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

struct Call {
  const bf16* x;        // [M, K]
  const uint8_t* w;     // panels, or bf16 rows
  bf16* y;              // [M, N]
  const float* sums;    // int4: of each group of x, [M, K / G]
  int64_t M, N, K, G;
};

struct Attention {
  const bf16* q;        // [B, KV, M, D], the M rows being query heads times positions
  const void *k, *v;    // bf16 or int8 [B, KV, L, D], by their strides
  const float *k_scales, *v_scales;  // of int8 [B, KV, L], by their strides
  const int64_t* positions;          // [B, S]
  int64_t KV, M, S, L, D, window, k_strides[3], v_strides[3], scale_strides[2];
  float scale;          // of a score, for powers of 2
};

inline int64_t int8_panel(int64_t K) { return LANES * K + LANES * 4; }
inline int64_t int4_panel(int64_t K, int64_t G) { return LANES * K / 2 + K / G * LANES * 4; }

// What was computed for a panel, out [M, 16], goes to its columns of y.
__attribute__((always_inline)) inline void store(const Call& c, int64_t panel, const float* out) {
  const int64_t n = std::min(LANES, c.N - panel * LANES);
  for (int64_t m = 0; m < c.M; ++m)
    for (int64_t r = 0; r < n; ++r) c.y[m * c.N + panel * LANES + r] = to_bf16(out[m * LANES + r]);
}

// ---- The weights of one panel as numbers: for prefill, and all there is on processors without a kernel below.

__attribute__((always_inline)) inline void int8_values(const uint8_t* panel, int64_t K, bf16* out) {  // out [16, K]
  float scales[LANES];
  std::memcpy(scales, panel + LANES * K, sizeof scales);
  for (int64_t r = 0; r < LANES; ++r)
    for (int64_t i = 0; i < K / 2; ++i) {
      const int8_t* q = reinterpret_cast<const int8_t*>(panel) + 2 * (LANES * i + r);
      out[r * K + 2 * i] = to_bf16(q[0] * scales[r]);
      out[r * K + 2 * i + 1] = to_bf16(q[1] * scales[r]);
    }
}

__attribute__((always_inline)) inline void int4_values(const uint8_t* panel, int64_t K, int64_t G, bf16* out) {
  for (int64_t g = 0; g < K / G; ++g, panel += LANES * G / 2 + LANES * 4) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(panel);
    const bf16* pairs = reinterpret_cast<const bf16*>(panel + LANES * G / 2);
    for (int64_t r = 0; r < LANES; ++r) {
      const float scale = to_float(pairs[2 * r]), zero = to_float(pairs[2 * r + 1]);
      bf16* row = out + r * K + g * G;
      for (int64_t i = 0; i < G / 8; ++i)
        for (int64_t j = 0; j < 8; ++j) {
          const int q = (words[LANES * i + r] >> (4 * (j / 2) + 16 * (j % 2))) & 0xF;
          row[8 * i + j] = to_bf16(float(q - 8) * scale + zero);
        }
    }
  }
}

// ---- Portable products of rows of x with one panel (or 16 plain rows): the compiler vectorises the lanes.

__attribute__((always_inline)) inline void plain_int8(const Call& c, const uint8_t* panel, float* out) {  // [M, 16]
  float scales[LANES];
  std::memcpy(scales, panel + LANES * c.K, sizeof scales);
  for (int64_t m = 0; m < c.M; ++m) {
    float even[LANES] = {0}, odd[LANES] = {0};
    for (int64_t i = 0; i < c.K / 2; ++i) {
      const int8_t* q = reinterpret_cast<const int8_t*>(panel) + 2 * LANES * i;
      const float a = to_float(c.x[m * c.K + 2 * i]), b = to_float(c.x[m * c.K + 2 * i + 1]);
      for (int64_t r = 0; r < LANES; ++r) {
        even[r] += a * q[2 * r];
        odd[r] += b * q[2 * r + 1];
      }
    }
    for (int64_t r = 0; r < LANES; ++r) out[m * LANES + r] = (even[r] + odd[r]) * scales[r];
  }
}

__attribute__((always_inline)) inline void plain_int4(const Call& c, const uint8_t* panel, float* out) {
  for (int64_t m = 0; m < c.M; ++m) {
    const uint8_t* at = panel;
    float total[LANES] = {0};
    for (int64_t g = 0; g < c.K / c.G; ++g, at += LANES * c.G / 2 + LANES * 4) {
      const uint32_t* words = reinterpret_cast<const uint32_t*>(at);
      const bf16* pairs = reinterpret_cast<const bf16*>(at + LANES * c.G / 2);
      float sum[LANES] = {0};
      for (int64_t i = 0; i < c.G / 8; ++i)
        for (int64_t j = 0; j < 8; ++j) {
          const float x = to_float(c.x[m * c.K + g * c.G + 8 * i + j]);
          const int shift = 4 * (j / 2) + 16 * (j % 2);
          for (int64_t r = 0; r < LANES; ++r) sum[r] += x * float(int((words[LANES * i + r] >> shift) & 0xF) - 8);
        }
      for (int64_t r = 0; r < LANES; ++r)
        total[r] += to_float(pairs[2 * r]) * sum[r] + to_float(pairs[2 * r + 1]) * c.sums[m * (c.K / c.G) + g];
    }
    std::memcpy(out + m * LANES, total, sizeof total);
  }
}

__attribute__((always_inline)) inline float dot(const bf16* x, const bf16* w, int64_t K) {
  float lanes[LANES] = {0}, total = 0;
  int64_t i = 0;
  for (; i + LANES <= K; i += LANES)
    for (int64_t r = 0; r < LANES; ++r) lanes[r] += to_float(x[i + r]) * to_float(w[i + r]);
  for (; i < K; ++i) total += to_float(x[i]) * to_float(w[i]);
  for (float lane : lanes) total += lane;
  return total;
}

__attribute__((always_inline)) inline void plain_bf16(const Call& c, int64_t begin, int64_t end) {
  const bf16* w = reinterpret_cast<const bf16*>(c.w);
  for (int64_t n = begin; n < end; ++n)
    for (int64_t m = 0; m < c.M; ++m) c.y[m * c.N + n] = to_bf16(dot(c.x + m * c.K, w + n * c.K, c.K));
}

// ---- The same for what the processor turns out to have.

#if defined(__x86_64__)
#include "cpu_avx512.h"
#include "cpu_attention.h"

#define AVX2 __attribute__((target("avx2,fma")))
AVX2 void int8_avx2(const Call& c, const uint8_t* panel, float* out) { plain_int8(c, panel, out); }
AVX2 void int4_avx2(const Call& c, const uint8_t* panel, float* out) { plain_int4(c, panel, out); }
AVX2 void bf16_avx2(const Call& c, int64_t begin, int64_t end) { plain_bf16(c, begin, end); }
AVX2 void int8_values_avx2(const uint8_t* panel, int64_t K, int64_t, bf16* out) { int8_values(panel, K, out); }
AVX2 void int4_values_avx2(const uint8_t* panel, int64_t K, int64_t G, bf16* out) { int4_values(panel, K, G, out); }
#endif

void int8_portable(const Call& c, const uint8_t* panel, float* out) { plain_int8(c, panel, out); }
void int4_portable(const Call& c, const uint8_t* panel, float* out) { plain_int4(c, panel, out); }
void bf16_portable(const Call& c, int64_t begin, int64_t end) { plain_bf16(c, begin, end); }
void int8_values_portable(const uint8_t* panel, int64_t K, int64_t, bf16* out) { int8_values(panel, K, out); }
void int4_values_portable(const uint8_t* panel, int64_t K, int64_t G, bf16* out) { int4_values(panel, K, G, out); }

// ---- What this processor has.

struct Functions {
  const char* name;
  void (*int8)(const Call&, const uint8_t*, float*);  // few rows, one panel
  void (*int4)(const Call&, const uint8_t*, float*);
  void (*bf16_dots)(const Call&, int64_t, int64_t);
  void (*int8_many)(const Call&, int64_t, int64_t);  // many rows, a range of panels; null: the values for at::mm
  void (*int4_many)(const Call&, int64_t, int64_t);
  void (*int8_values)(const uint8_t*, int64_t, int64_t, bf16*);
  void (*int4_values)(const uint8_t*, int64_t, int64_t, bf16*);
  void (*attend[2])(const Attention&, int64_t, int64_t, int64_t, int64_t, float*, float*, float*) = {};  // bf16, int8
};

const std::vector<Functions>& available() {  // the best comes first
  static const std::vector<Functions> found = [] {
    std::vector<Functions> list;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
      list.push_back({"avx512", int8_avx512, int4_avx512, bf16_avx512, many_avx512<false>, many_avx512<true>, nullptr, nullptr,
                      {attend_avx512<bf16>, attend_avx512<int8_t>}});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      list.push_back({"avx2", int8_avx2, int4_avx2, bf16_avx2, nullptr, nullptr, int8_values_avx2, int4_values_avx2});
#endif
    list.push_back({"portable", int8_portable, int4_portable, bf16_portable, nullptr, nullptr, int8_values_portable, int4_values_portable});
    return list;
  }();
  return found;
}

Functions chosen = available().front();

// ---- The operators.

int64_t panels(int64_t N) { return (N + LANES - 1) / LANES; }

Call make_call(const at::Tensor& x, const at::Tensor& w, at::Tensor& y, int64_t N, int64_t G, const float* sums) {
  return {static_cast<const bf16*>(x.const_data_ptr()), static_cast<const uint8_t*>(w.const_data_ptr()),
          static_cast<bf16*>(y.data_ptr()), sums, x.size(0), N, x.size(1), G};
}

// y = x W^T of many rows: the panels as bf16 rows, as many as the cache holds, and a product of matrices.
void by_matrices(const Call& c, const at::Tensor& x, at::Tensor& y, bool is_int4) {
  const int64_t bytes = is_int4 ? int4_panel(c.K, c.G) : int8_panel(c.K);
  const int64_t at_once = std::max<int64_t>(1, SCRATCH / (LANES * c.K));
  at::Tensor scratch = at::empty({std::min(at_once, panels(c.N)) * LANES, c.K}, x.options());
  bf16* rows = static_cast<bf16*>(scratch.data_ptr());
  auto values = is_int4 ? chosen.int4_values : chosen.int8_values;
  for (int64_t p = 0; p < panels(c.N); p += at_once) {
    const int64_t n = std::min(at_once, panels(c.N) - p);
    at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) values(c.w + (p + i) * bytes, c.K, c.G, rows + i * LANES * c.K);
    });
    const int64_t n_rows = std::min(n * LANES, c.N - p * LANES);
    y.narrow(1, p * LANES, n_rows).copy_(at::mm(x, scratch.narrow(0, 0, n_rows).t()));
  }
}

void few_rows(const Call& c, bool is_int4) {
  const int64_t bytes = is_int4 ? int4_panel(c.K, c.G) : int8_panel(c.K);
  auto multiply = is_int4 ? chosen.int4 : chosen.int8;
  at::parallel_for(0, panels(c.N), 1, [&](int64_t begin, int64_t end) {
    float out[MAX_ROWS * LANES];
    for (int64_t p = begin; p < end; ++p) {
      multiply(c, c.w + p * bytes, out);
      store(c, p, out);
    }
  });
}

void many_rows(Call c, bool is_int4) {
  const int64_t n_rows = c.M;
  auto multiply = is_int4 ? chosen.int4_many : chosen.int8_many;
  for (int64_t first = 0; first < n_rows; first += ROWS_AT_ONCE, c.x += c.M * c.K, c.y += c.M * c.N) {
    c.M = std::min(n_rows - first, ROWS_AT_ONCE);
    at::parallel_for(0, panels(c.N), 2, [&](int64_t begin, int64_t end) { multiply(c, begin, end); });
  }
}

void multiply(const Call& c, const at::Tensor& x, at::Tensor& y, bool is_int4) {
  if (c.M <= MAX_ROWS)
    few_rows(c, is_int4);
  else if (chosen.int8_many)
    many_rows(c, is_int4);
  else
    by_matrices(c, x, y, is_int4);
}

void check(const at::Tensor& x, const at::Tensor& w, at::ScalarType dtype, int64_t expected_bytes) {
  TORCH_CHECK(x.dim() == 2 && x.scalar_type() == at::kBFloat16, "x must be bfloat16 [M, K]");
  TORCH_CHECK(w.scalar_type() == dtype, "the weight is ", w.scalar_type(), ", not ", dtype);
  TORCH_CHECK(w.is_contiguous() && int64_t(w.nbytes()) == expected_bytes, "the weight has ", w.nbytes(), " bytes, not ",
              expected_bytes);
}

at::Tensor int8_linear(const at::Tensor& x_any, const at::Tensor& packed, int64_t N) {
  const at::Tensor x = x_any.contiguous();
  const int64_t K = x.size(-1);
  check(x, packed, at::kByte, panels(N) * int8_panel(K));
  at::Tensor y = at::empty({x.size(0), N}, x.options());
  multiply(make_call(x, packed, y, N, K, nullptr), x, y, false);
  return y;
}

at::Tensor int4_linear(const at::Tensor& x_any, const at::Tensor& packed, int64_t N, int64_t G) {
  const at::Tensor x = x_any.contiguous();
  const int64_t K = x.size(-1);
  TORCH_CHECK(G > 0 && G % 32 == 0 && K % G == 0, K, " inputs do not fall into groups of ", G);
  check(x, packed, at::kByte, panels(N) * int4_panel(K, G));
  at::Tensor y = at::empty({x.size(0), N}, x.options());
  std::vector<float> sums(x.size(0) > MAX_ROWS ? 0 : x.size(0) * (K / G));
  const bf16* data = static_cast<const bf16*>(x.const_data_ptr());
  for (size_t g = 0; g < sums.size(); ++g) {
    float lanes[LANES] = {0};  // 16 sums side by side, or each addition waits for the one before
    for (int64_t i = 0; i < G; i += LANES)
      for (int64_t r = 0; r < LANES; ++r) lanes[r] += to_float(data[g * G + i + r]);
    for (float lane : lanes) sums[g] += lane;
  }
  multiply(make_call(x, packed, y, N, G, sums.data()), x, y, true);
  return y;
}

at::Tensor bf16_linear(const at::Tensor& x_any, const at::Tensor& weight) {
  const at::Tensor x = x_any.contiguous();
  const int64_t N = weight.size(0);
  check(x, weight, at::kBFloat16, 2 * N * x.size(-1));
  if (x.size(0) > MAX_ROWS) return at::mm(x, weight.t());
  at::Tensor y = at::empty({x.size(0), N}, x.options());
  const Call c = make_call(x, weight, y, N, 1, nullptr);
  at::parallel_for(0, N, LANES, [&](int64_t begin, int64_t end) { chosen.bf16_dots(c, begin, end); });
  return y;
}

// What a row's pieces found, each best, total and out [D], becomes its result.
void put_together(const std::vector<int64_t>& pieces, int64_t m, int64_t M, int64_t D, const float* best, const float* total,
                  const float* out, bf16* y) {
  float greatest = -INFINITY, sum = 0;
  for (int64_t i : pieces) greatest = std::max(greatest, best[i * M + m]);
  std::vector<float> values(D);
  for (int64_t i : pieces) {
    if (best[i * M + m] == -INFINITY) continue;
    const float factor = std::exp2(best[i * M + m] - greatest);
    sum += factor * total[i * M + m];
    for (int64_t d = 0; d < D; ++d) values[d] += factor * out[(i * M + m) * D + d];
  }
  for (int64_t d = 0; d < D; ++d) y[d] = to_bf16(sum ? values[d] / sum : 0.f);
}

// All chunks of all key heads in a row are cut into as many equal pieces as there are threads. The part of head h in
// piece t has the number t + h, which no other part has, as no two pieces share more than one head.
void attend(const Attention& c, int64_t B, bool is_int8, at::TensorOptions options, bf16* y) {
  const int64_t n_heads = B * c.KV;
  std::vector<int64_t> begins(B), ends(B), units(n_heads + 1);
  for (int64_t h = 0; h < n_heads; ++h) {
    const int64_t b = h / c.KV, *at = c.positions + b * c.S;
    ends[b] = std::clamp<int64_t>(*std::max_element(at, at + c.S) + 1, 1, c.L);
    begins[b] = c.window ? std::clamp<int64_t>(*std::min_element(at, at + c.S) + 1 - c.window, 0, ends[b] - 1) : 0;
    units[h + 1] = units[h] + (ends[b] - begins[b] + CHUNK - 1) / CHUNK;
  }
  const int64_t n_pieces = std::min<int64_t>(units[n_heads], at::get_num_threads()), n_parts = n_pieces + n_heads - 1;
  at::Tensor found = at::empty({n_parts * c.M * (c.D + 2)}, options.dtype(at::kFloat));
  float *best = static_cast<float*>(found.data_ptr()), *total = best + n_parts * c.M, *out = total + n_parts * c.M;
  const auto part = [&](int64_t t, int64_t h) {  // its chunks, from the first of the head
    const int64_t from = std::max(units[h], units[n_heads] * t / n_pieces);
    return std::pair(from - units[h], std::min(units[h + 1], units[n_heads] * (t + 1) / n_pieces) - units[h]);
  };
  at::parallel_for(0, n_pieces, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      for (int64_t h = 0; h < n_heads; ++h)
        if (const auto [from, until] = part(t, h); from < until) {
          const int64_t b = h / c.KV, i = (t + h) * c.M;
          const int64_t begin = begins[b] + from * CHUNK, end = std::min(begins[b] + until * CHUNK, ends[b]);
          chosen.attend[is_int8](c, b, h % c.KV, begin, end, best + i, total + i, out + i * c.D);
        }
  });
  for (int64_t h = 0; h < n_heads; ++h) {
    std::vector<int64_t> parts;
    for (int64_t t = 0; t < n_pieces; ++t)
      if (const auto [from, until] = part(t, h); from < until) parts.push_back(t + h);
    for (int64_t m = 0; m < c.M; ++m) put_together(parts, m, c.M, c.D, best, total, out, y + (h * c.M + m) * c.D);
  }
}

// q [B, H, S, D] at positions [B, S] over k, v [B, KV, L, D], which may be views of a cache, as int8 with scales
// [B, KV, L]; a query sees the slots up to its position, with a window only so many of them. Like q, contiguous.
at::Tensor decode_attention(const at::Tensor& q_any, const at::Tensor& k, const at::Tensor& v, const at::Tensor& positions_any,
                            int64_t window, const std::optional<at::Tensor>& k_scales, const std::optional<at::Tensor>& v_scales) {
  TORCH_CHECK(chosen.attend[0], "attention needs AVX-512 with bf16");
  const int64_t B = q_any.size(0), H = q_any.size(1), S = q_any.size(2), D = q_any.size(3), KV = k.size(1), L = k.size(2);
  const bool is_int8 = k.scalar_type() == at::kChar;
  TORCH_CHECK(q_any.scalar_type() == at::kBFloat16 && (is_int8 || k.scalar_type() == at::kBFloat16) && v.scalar_type() == k.scalar_type(),
              "q must be bfloat16, k and v too or both int8");
  TORCH_CHECK(k.sizes() == v.sizes() && k.dim() == 4 && k.size(0) == B && k.size(3) == D && KV > 0 && L > 0 && H % KV == 0,
              "k and v of shape ", k.sizes(), " and ", v.sizes(), " do not fit q of shape ", q_any.sizes());
  TORCH_CHECK(positions_any.scalar_type() == at::kLong && positions_any.sizes() == at::IntArrayRef({B, S}),
              "positions must be int64 [B, S]");
  TORCH_CHECK(D % 32 == 0 && k.stride(3) == 1 && v.stride(3) == 1,
              "a head must be contiguous and a multiple of 32 elements, not ", D);
  Attention c{};
  if (is_int8) {
    TORCH_CHECK(k_scales && v_scales, "int8 keys and values need scales");
    for (const at::Tensor& scales : {*k_scales, *v_scales})
      TORCH_CHECK(scales.scalar_type() == at::kFloat && scales.sizes() == at::IntArrayRef({B, KV, L}) && scales.stride(2) == 1 &&
                  scales.strides() == k_scales->strides(), "scales must be float32 [B, KV, L], laid out alike");
    c.k_scales = static_cast<const float*>(k_scales->const_data_ptr()), c.v_scales = static_cast<const float*>(v_scales->const_data_ptr());
    c.scale_strides[0] = k_scales->stride(0), c.scale_strides[1] = k_scales->stride(1);
  }
  const at::Tensor q = q_any.contiguous(), positions = positions_any.contiguous();
  at::Tensor y = at::empty({B, H, S, D}, q.options());
  c.q = static_cast<const bf16*>(q.const_data_ptr()), c.k = k.const_data_ptr(), c.v = v.const_data_ptr();
  c.positions = static_cast<const int64_t*>(positions.const_data_ptr());
  c.KV = KV, c.M = H / KV * S, c.S = S, c.L = L, c.D = D, c.window = window;
  for (int i = 0; i < 3; ++i) c.k_strides[i] = k.stride(i), c.v_strides[i] = v.stride(i);
  c.scale = 1.44269504f / std::sqrt(float(D));
  attend(c, B, is_int8, q.options(), static_cast<bf16*>(y.data_ptr()));
  return y;
}

std::string variant(const std::string& name) {  // choose by name, "" for the best; which one is in use
  for (const Functions& functions : available())
    if (name.empty() || name == functions.name) {
      chosen = functions;
      return chosen.name;
    }
  TORCH_CHECK(false, "this processor does not run ", name);
}

}  // namespace

TORCH_LIBRARY(fast, m) {
  m.def("int8_linear(Tensor x, Tensor packed, int n_out) -> Tensor");
  m.def("int4_linear(Tensor x, Tensor packed, int n_out, int groupsize) -> Tensor");
  m.def("bf16_linear(Tensor x, Tensor weight) -> Tensor");
  m.def("decode_attention(Tensor q, Tensor k, Tensor v, Tensor positions, int window=0, Tensor? k_scales=None, "
        "Tensor? v_scales=None) -> Tensor");
  m.def("variant(str name) -> str", variant);
}

TORCH_LIBRARY_IMPL(fast, CPU, m) {
  m.impl("int8_linear", int8_linear);
  m.impl("int4_linear", int4_linear);
  m.impl("bf16_linear", bf16_linear);
  m.impl("decode_attention", decode_attention);
}
