// Products of a few rows with bf16, int8 and int4 weights on a CPU, at the speed at which memory delivers the weights.
//
// Quantised weights lie in panels of 16 rows, one row per lane: a register of weights meets a broadcast input, and no sum
// runs across lanes. Each thread reads one stream of panels from its first byte to its last, the scales inside it. Up to
// 8 rows of x share what is read of a panel, 16 take it twice, the second time from the cache; with more rows (prefill)
// the panels are turned into plain bf16 rows, a cache's worth at a time, for at::mm.
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
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace {

constexpr int64_t LANES = 16;
constexpr int64_t MAX_ROWS = 16;           // of x; above it is a prefill
constexpr int64_t SCRATCH = 1 << 20;       // elements of the weight that a prefill multiplies at a time
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

inline int64_t int8_panel(int64_t K) { return LANES * K + LANES * 4; }
inline int64_t int4_panel(int64_t K, int64_t G) { return LANES * K / 2 + K / G * LANES * 4; }

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

// ---- The same with AVX-512 and its bf16 dot product, for M rows at a time.

#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")))
#define INLINE_AVX512 AVX512 __attribute__((always_inline)) inline

INLINE_AVX512 __m512bh pairs_at(const void* x) { return (__m512bh)_mm512_loadu_si512(x); }
INLINE_AVX512 __m512bh pair_everywhere(const bf16* x) {  // two neighbours of x in every lane
  int32_t both;
  std::memcpy(&both, x, 4);
  return (__m512bh)_mm512_set1_epi32(both);
}

// With several rows of x there is so much to do per cache line that the processor does not look far enough ahead.
INLINE_AVX512 void fetch(const void* weights) { _mm_prefetch((const char*)weights + 2048, _MM_HINT_T0); }

// int8 to bf16 by way of float32: 8 bits of magnitude are more than a bf16's 7 behind the leading one, so no bit trick.
INLINE_AVX512 __m512bh int8_pairs(const uint8_t* q) {
  const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)q)));
  const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(q + 16))));
  return _mm512_cvtne2ps_pbh(high, low);
}

template <int M>
AVX512 void int8_rows(const Call& c, const uint8_t* panel, int64_t first, float* out) {
  constexpr int CHAINS = M > 2 ? 1 : 4 / M;  // enough sums at once to hide the latency of adding to one
  __m512 sums[CHAINS][M];
  for (auto& chain : sums)
    for (auto& sum : chain) sum = _mm512_setzero_ps();
  const bf16* x = c.x + first * c.K;
  const int64_t pairs = c.K / 2;
  int64_t i = 0;
  for (; i + CHAINS <= pairs; i += CHAINS)
    for (int a = 0; a < CHAINS; ++a) {
      if (M > 2 && (i + a) % 2 == 0) fetch(panel + 2 * LANES * (i + a));
      const __m512bh w = int8_pairs(panel + 2 * LANES * (i + a));
      for (int m = 0; m < M; ++m) sums[a][m] = _mm512_dpbf16_ps(sums[a][m], w, pair_everywhere(x + m * c.K + 2 * (i + a)));
    }
  for (; i < pairs; ++i) {
    const __m512bh w = int8_pairs(panel + 2 * LANES * i);
    for (int m = 0; m < M; ++m) sums[0][m] = _mm512_dpbf16_ps(sums[0][m], w, pair_everywhere(x + m * c.K + 2 * i));
  }
  const __m512 scales = _mm512_loadu_ps(panel + LANES * c.K);
  for (int m = 0; m < M; ++m) {
    for (int a = 1; a < CHAINS; ++a) sums[0][m] = _mm512_add_ps(sums[0][m], sums[a][m]);
    _mm512_storeu_ps(out + (first + m) * LANES, _mm512_mul_ps(sums[0][m], scales));
  }
}

// 0x4300 | q is 128 + q in bf16: four bits become a number by one shift and one logical operation. What is added that
// way, 128, and the 8 of q - 8 leave again through the group's sum of x, from which its accumulator starts.
template <int M>
AVX512 void int4_rows(const Call& c, const uint8_t* panel, int64_t first, float* out) {
  constexpr int CHAINS = M > 2 ? 1 : 4 / M;
  const __m512i low = _mm512_set1_epi32(0x000F000F), magic = _mm512_set1_epi32(0x43004300);
  const int64_t n_groups = c.K / c.G;
  __m512 totals[M];
  for (auto& total : totals) total = _mm512_setzero_ps();
  const bf16* x = c.x + first * c.K;
  const float* x_sums = c.sums + first * n_groups;
  for (int64_t g = 0; g < n_groups; ++g) {
    __m512 sums[CHAINS][M];
    for (int m = 0; m < M; ++m) {
      sums[0][m] = _mm512_set1_ps(-136.f * x_sums[m * n_groups + g]);
      for (int a = 1; a < CHAINS; ++a) sums[a][m] = _mm512_setzero_ps();
    }
    for (int64_t i = 0; i < c.G; i += 8, panel += LANES * 4) {
      if (M > 2) fetch(panel);
      const __m512i words = _mm512_loadu_si512(panel);
#define FOUR_BITS(j)                                                                                              \
  {                                                                                                               \
    const __m512i bits = _mm512_ternarylogic_epi32(_mm512_srli_epi32(words, 4 * j), low, magic, 0xEA);             \
    for (int m = 0; m < M; ++m)                                                                                   \
      sums[j % CHAINS][m] = _mm512_dpbf16_ps(sums[j % CHAINS][m], (__m512bh)bits,                                 \
                                             pair_everywhere(x + m * c.K + g * c.G + i + 2 * j));                 \
  }
      FOUR_BITS(0) FOUR_BITS(1) FOUR_BITS(2) FOUR_BITS(3)
#undef FOUR_BITS
    }
    const __m512i pairs = _mm512_loadu_si512(panel);
    panel += LANES * 4;
    const __m512 scales = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    const __m512 zeros = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xFFFF0000))));
    for (int m = 0; m < M; ++m) {
      for (int a = 1; a < CHAINS; ++a) sums[0][m] = _mm512_add_ps(sums[0][m], sums[a][m]);
      totals[m] = _mm512_fmadd_ps(scales, sums[0][m], totals[m]);
      totals[m] = _mm512_fmadd_ps(zeros, _mm512_set1_ps(x_sums[m * n_groups + g]), totals[m]);
    }
  }
  for (int m = 0; m < M; ++m) _mm512_storeu_ps(out + (first + m) * LANES, totals[m]);
}

// R rows of the weight at a time, so that what is loaded of x serves them all.
template <int M, int R>
INLINE_AVX512 void bf16_block(const Call& c, int64_t first, int64_t n) {
  constexpr int CHAINS = M * R > 2 ? 1 : 4 / (M * R);
  __m512 sums[CHAINS][M][R];
  for (auto& chain : sums)
    for (auto& row : chain)
      for (auto& sum : row) sum = _mm512_setzero_ps();
  const bf16 *x = c.x + first * c.K, *w = reinterpret_cast<const bf16*>(c.w) + n * c.K;
  int64_t k = 0;
  for (; k + 32 * CHAINS <= c.K; k += 32 * CHAINS)
    for (int a = 0; a < CHAINS; ++a) {
      __m512bh weights[R];
      for (int r = 0; r < R; ++r) {
        if (R > 1) _mm_prefetch((const char*)(w + (r + R) * c.K + k), _MM_HINT_T1);  // the next R rows
        weights[r] = pairs_at(w + r * c.K + k + 32 * a);
      }
      for (int m = 0; m < M; ++m) {
        const __m512bh inputs = pairs_at(x + m * c.K + k + 32 * a);
        for (int r = 0; r < R; ++r) sums[a][m][r] = _mm512_dpbf16_ps(sums[a][m][r], weights[r], inputs);
      }
    }
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) {
      for (int a = 1; a < CHAINS; ++a) sums[0][m][r] = _mm512_add_ps(sums[0][m][r], sums[a][m][r]);
      float total = _mm512_reduce_add_ps(sums[0][m][r]);
      for (int64_t i = k; i < c.K; ++i) total += to_float(w[r * c.K + i]) * to_float(x[m * c.K + i]);
      c.y[(first + m) * c.N + n + r] = to_bf16(total);
    }
}

template <int M>
AVX512 void bf16_rows(const Call& c, int64_t first, int64_t begin, int64_t end) {
  constexpr int R = M <= 2 ? 1 : M <= 6 ? 4 : 3;  // as many sums as the registers hold
  int64_t n = begin;
  for (; n + R <= end; n += R) bf16_block<M, R>(c, first, n);
  for (; n < end; ++n) bf16_block<M, 1>(c, first, n);
}

#define UP_TO_8_ROWS(function, ...)                   \
  for (int64_t m = 0; m < c.M; m += 8) switch (std::min<int64_t>(c.M - m, 8)) { \
      case 1: function<1>(__VA_ARGS__); break;        \
      case 2: function<2>(__VA_ARGS__); break;        \
      case 3: function<3>(__VA_ARGS__); break;        \
      case 4: function<4>(__VA_ARGS__); break;        \
      case 5: function<5>(__VA_ARGS__); break;        \
      case 6: function<6>(__VA_ARGS__); break;        \
      case 7: function<7>(__VA_ARGS__); break;        \
      case 8: function<8>(__VA_ARGS__); break;        \
    }

AVX512 void int8_avx512(const Call& c, const uint8_t* panel, float* out) { UP_TO_8_ROWS(int8_rows, c, panel, m, out) }
AVX512 void int4_avx512(const Call& c, const uint8_t* panel, float* out) { UP_TO_8_ROWS(int4_rows, c, panel, m, out) }
AVX512 void bf16_avx512(const Call& c, int64_t begin, int64_t end) { UP_TO_8_ROWS(bf16_rows, c, m, begin, end) }

AVX2 void int8_avx2(const Call& c, const uint8_t* panel, float* out) { plain_int8(c, panel, out); }
AVX2 void int4_avx2(const Call& c, const uint8_t* panel, float* out) { plain_int4(c, panel, out); }
AVX2 void bf16_avx2(const Call& c, int64_t begin, int64_t end) { plain_bf16(c, begin, end); }
AVX2 void int8_values_avx2(const uint8_t* panel, int64_t K, int64_t, bf16* out) { int8_values(panel, K, out); }
AVX2 void int4_values_avx2(const uint8_t* panel, int64_t K, int64_t G, bf16* out) { int4_values(panel, K, G, out); }
AVX512 void int8_values_avx512(const uint8_t* panel, int64_t K, int64_t, bf16* out) { int8_values(panel, K, out); }
AVX512 void int4_values_avx512(const uint8_t* panel, int64_t K, int64_t G, bf16* out) { int4_values(panel, K, G, out); }
#endif

void int8_portable(const Call& c, const uint8_t* panel, float* out) { plain_int8(c, panel, out); }
void int4_portable(const Call& c, const uint8_t* panel, float* out) { plain_int4(c, panel, out); }
void bf16_portable(const Call& c, int64_t begin, int64_t end) { plain_bf16(c, begin, end); }
void int8_values_portable(const uint8_t* panel, int64_t K, int64_t, bf16* out) { int8_values(panel, K, out); }
void int4_values_portable(const uint8_t* panel, int64_t K, int64_t G, bf16* out) { int4_values(panel, K, G, out); }

// ---- What this processor has.

struct Functions {
  const char* name;
  void (*int8)(const Call&, const uint8_t*, float*);
  void (*int4)(const Call&, const uint8_t*, float*);
  void (*bf16_dots)(const Call&, int64_t, int64_t);
  void (*int8_values)(const uint8_t*, int64_t, int64_t, bf16*);
  void (*int4_values)(const uint8_t*, int64_t, int64_t, bf16*);
};

const std::vector<Functions>& available() {  // the best comes first
  static const std::vector<Functions> found = [] {
    std::vector<Functions> list;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      list.push_back({"avx512", int8_avx512, int4_avx512, bf16_avx512, int8_values_avx512, int4_values_avx512});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      list.push_back({"avx2", int8_avx2, int4_avx2, bf16_avx2, int8_values_avx2, int4_values_avx2});
#endif
    list.push_back({"portable", int8_portable, int4_portable, bf16_portable, int8_values_portable, int4_values_portable});
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
void prefill(const Call& c, const at::Tensor& x, at::Tensor& y, bool is_int4) {
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
      const int64_t n = std::min(LANES, c.N - p * LANES);
      for (int64_t m = 0; m < c.M; ++m)
        for (int64_t r = 0; r < n; ++r) c.y[m * c.N + p * LANES + r] = to_bf16(out[m * LANES + r]);
    }
  });
}

void check(const at::Tensor& x, const at::Tensor& w, int64_t expected_bytes) {
  TORCH_CHECK(x.dim() == 2 && x.scalar_type() == at::kBFloat16, "x must be bfloat16 [M, K]");
  TORCH_CHECK(w.is_contiguous() && int64_t(w.nbytes()) == expected_bytes, "the weight has ", w.nbytes(), " bytes, not ",
              expected_bytes);
}

at::Tensor int8_linear(const at::Tensor& x_any, const at::Tensor& packed, int64_t N) {
  const at::Tensor x = x_any.contiguous();
  const int64_t K = x.size(-1);
  check(x, packed, panels(N) * int8_panel(K));
  at::Tensor y = at::empty({x.size(0), N}, x.options());
  const Call c = make_call(x, packed, y, N, K, nullptr);
  if (c.M > MAX_ROWS)
    prefill(c, x, y, false);
  else
    few_rows(c, false);
  return y;
}

at::Tensor int4_linear(const at::Tensor& x_any, const at::Tensor& packed, int64_t N, int64_t G) {
  const at::Tensor x = x_any.contiguous();
  const int64_t K = x.size(-1), n_groups = K / G;
  check(x, packed, panels(N) * int4_panel(K, G));
  at::Tensor y = at::empty({x.size(0), N}, x.options());
  if (x.size(0) > MAX_ROWS) {
    prefill(make_call(x, packed, y, N, G, nullptr), x, y, true);
    return y;
  }
  std::vector<float> sums(x.size(0) * n_groups);
  const bf16* data = static_cast<const bf16*>(x.const_data_ptr());
  for (size_t g = 0; g < sums.size(); ++g)
    for (int64_t i = 0; i < G; ++i) sums[g] += to_float(data[g * G + i]);
  few_rows(make_call(x, packed, y, N, G, sums.data()), true);
  return y;
}

at::Tensor bf16_linear(const at::Tensor& x_any, const at::Tensor& weight) {
  const at::Tensor x = x_any.contiguous();
  const int64_t N = weight.size(0);
  check(x, weight, 2 * N * x.size(-1));
  if (x.size(0) > MAX_ROWS) return at::mm(x, weight.t());
  at::Tensor y = at::empty({x.size(0), N}, x.options());
  const Call c = make_call(x, weight, y, N, 1, nullptr);
  at::parallel_for(0, N, LANES, [&](int64_t begin, int64_t end) { chosen.bf16_dots(c, begin, end); });
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
  m.def("variant(str name) -> str", variant);
}

TORCH_LIBRARY_IMPL(fast, CPU, m) {
  m.impl("int8_linear", int8_linear);
  m.impl("int4_linear", int4_linear);
  m.impl("bf16_linear", bf16_linear);
}
