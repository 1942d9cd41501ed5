// Products of a few rows with bf16, int8 and int4 weights on a CPU, at the speed at which memory delivers the weights.
//
// Weights lie in panels of 16 rows, one row per lane: a register of weights meets a broadcast input, and no sum runs
// across lanes. Each thread reads one stream of panels from its first byte to its last, the scales inside it. Up to
// 8 rows of x share what is read of a panel, 16 take it twice, the second time from the cache; with more rows (prefill)
// a panel is first unpacked to bf16, or without AVX-512 a cache's worth of panels to plain rows for at::mm.
//
// A panel of bf16:  K/2 times 64 bytes: row r's inputs 2i, 2i+1 at 4r.
// A panel of int8:  K/2 times 32 bytes: row r's inputs 2i, 2i+1 at 2r, 2r+1.  Then 16 float32 scales.
// A panel of int4:  K/8 times 16 words of 32 bits, row r's in word r: inputs 0, 2, 4, 6 in its low half from the lowest
//                   four bits up, inputs 1, 3, 5, 7 in its high half.  After each group 16 pairs of bf16, (scale, zero).

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <bit>
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
#define INLINE __attribute__((always_inline)) inline

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

enum Kind { BF16, INT8, INT4 };

struct Call {
  const bf16* x;        // [M, K]
  const uint8_t* w;     // panels
  bf16* y;              // [M, N]
  const bf16* pairs;    // few rows: x again, for each `rows_at_once` (or the rest) [K / 2, rows] pairs of neighbours
  const float* sums;    // int4, few rows: of each group of x, [M, K / G]
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

inline int64_t panel_bytes(Kind kind, int64_t K, int64_t G) {
  return kind == BF16 ? LANES * K * 2 : kind == INT8 ? LANES * K + LANES * 4 : LANES * K / 2 + K / G * LANES * 4;
}

// What was computed for a panel, out [M, 16], goes to its columns of y.
INLINE void store(const Call& c, int64_t panel, const float* out) {
  const int64_t n = std::min(LANES, c.N - panel * LANES);
  for (int64_t m = 0; m < c.M; ++m)
    for (int64_t r = 0; r < n; ++r) c.y[m * c.N + panel * LANES + r] = to_bf16(out[m * LANES + r]);
}

// ---- The weights of one panel as numbers: for prefill, and all there is on processors without a kernel below.

INLINE void bf16_values(const uint8_t* panel, int64_t K, bf16* out) {  // out [16, K]
  for (int64_t i = 0; i < K / 2; ++i)
    for (int64_t r = 0; r < LANES; ++r) std::memcpy(out + r * K + 2 * i, panel + 4 * (LANES * i + r), 4);
}

INLINE void int8_values(const uint8_t* panel, int64_t K, bf16* out) {
  float scales[LANES];
  std::memcpy(scales, panel + LANES * K, sizeof scales);
  for (int64_t r = 0; r < LANES; ++r)
    for (int64_t i = 0; i < K / 2; ++i) {
      const int8_t* q = reinterpret_cast<const int8_t*>(panel) + 2 * (LANES * i + r);
      out[r * K + 2 * i] = to_bf16(q[0] * scales[r]);
      out[r * K + 2 * i + 1] = to_bf16(q[1] * scales[r]);
    }
}

INLINE void int4_values(const uint8_t* panel, int64_t K, int64_t G, bf16* out) {
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

// ---- What comes before and after a product, a row at a time: plain loops that the compiler makes vectors of.

INLINE float power_of_2(float x) {
  x = std::min(std::max(x, -126.f), 126.f);
  const float shifted = x + 12582912.f, f = x - (shifted - 12582912.f);  // 1.5 * 2^23: the last bits are x rounded
  float p = 0.00133335581f;                                             // 2^f on [-1/2, 1/2], Taylor
  p = p * f + 0.00961812911f;
  p = p * f + 0.0555041087f;
  p = p * f + 0.240226507f;
  p = p * f + 0.693147181f;
  p = p * f + 1.f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(p) + (std::bit_cast<uint32_t>(shifted) << 23));
}

INLINE void normalize(const bf16* x, const bf16* weight, float eps, int64_t n, bf16* y) {  // RMSNorm; n is even
  float sums[LANES] = {0};
  for (int64_t i = 0; i + LANES <= n; i += LANES)
    for (int64_t r = 0; r < LANES; ++r) sums[r] += to_float(x[i + r]) * to_float(x[i + r]);
  for (int64_t i = n / LANES * LANES; i < n; ++i) sums[0] += to_float(x[i]) * to_float(x[i]);
  float sum = 0;
  for (float lane : sums) sum += lane;
  const float factor = 1 / std::sqrt(sum / n + eps);
  for (int64_t i = 0; i < n; ++i) y[i] = to_bf16(to_float(x[i]) * factor * to_float(weight[i]));
}

INLINE void add(const bf16* x, int64_t n, bf16* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = to_bf16(to_float(y[i]) + to_float(x[i]));
}

INLINE void gate(const bf16* x, int64_t n, bf16* y) {  // SiLU of the first n, times the n behind them
  for (int64_t i = 0; i < n; ++i) {
    const float a = to_float(x[i]);
    y[i] = to_bf16(a / (1 + power_of_2(a * -1.44269504f)) * to_float(x[n + i]));
  }
}

#define ROWS(name, target)                                                                    \
  target void normalize_##name(const bf16* x, const bf16* weight, float eps, int64_t n, bf16* y) { normalize(x, weight, eps, n, y); } \
  target void add_##name(const bf16* x, int64_t n, bf16* y) { add(x, n, y); }                 \
  target void gate_##name(const bf16* x, int64_t n, bf16* y) { gate(x, n, y); }
#define ROW_FUNCTIONS(name) normalize_##name, add_##name, gate_##name

// ---- Portable products of M rows of x, `x [K / 2, M]` pairs, with one panel, whose 16 rows are the lanes of PARTS
// vectors as wide as the processor's.

template <int WIDTH>
struct Vectors;
#define VECTORS(width)                                                \
  template <>                                                         \
  struct Vectors<width> {                                             \
    using Floats = float __attribute__((vector_size(4 * width)));     \
    using Words = uint32_t __attribute__((vector_size(4 * width)));   \
    using Ints = int32_t __attribute__((vector_size(4 * width)));     \
    using Shorts = int16_t __attribute__((vector_size(2 * width)));   \
  };
VECTORS(4)
VECTORS(8)

template <int WIDTH>
struct Portable {
  using Floats = typename Vectors<WIDTH>::Floats;
  using Words = typename Vectors<WIDTH>::Words;
  using Ints = typename Vectors<WIDTH>::Ints;
  using Shorts = typename Vectors<WIDTH>::Shorts;
  static constexpr int PARTS = LANES / WIDTH;

  template <typename T>
  static INLINE T at(const uint8_t* panel, int part) {
    T vector;
    std::memcpy(&vector, panel + part * sizeof vector, sizeof vector);
    return vector;
  }

  static INLINE Floats low(Words pairs) { return (Floats)(pairs << 16); }  // of two bf16 each
  static INLINE Floats high(Words pairs) { return (Floats)(pairs & 0xFFFF0000); }
  static INLINE Floats floats(Ints numbers) { return __builtin_convertvector(numbers, Floats); }

  // even, odd: the weights of a pair of inputs.
  template <int M>
  static INLINE void add(const bf16* x, Floats even, Floats odd, Floats* sums) {
    for (int m = 0; m < M; ++m) {
      sums[m] += to_float(x[2 * m]) * even;
      sums[m] += to_float(x[2 * m + 1]) * odd;
    }
  }

  template <int M>
  static INLINE void put(const Floats* sums, int part, float* out) {
    for (int m = 0; m < M; ++m) std::memcpy(out + LANES * m + WIDTH * part, &sums[m], sizeof sums[m]);
  }

  template <int M>
  static INLINE void bf16_rows(const Call& c, const bf16* x, const float*, const uint8_t* panel, float* out) {
    Floats sums[PARTS][M] = {};
    for (int64_t i = 0; i < c.K / 2; ++i, x += 2 * M, panel += 64)
      for (int part = 0; part < PARTS; ++part) {
        const Words pairs = at<Words>(panel, part);
        add<M>(x, low(pairs), high(pairs), sums[part]);
      }
    for (int part = 0; part < PARTS; ++part) put<M>(sums[part], part, out);
  }

  template <int M>
  static INLINE void int8_rows(const Call& c, const bf16* x, const float*, const uint8_t* panel, float* out) {
    Floats sums[PARTS][M] = {};
    for (int64_t i = 0; i < c.K / 2; ++i, x += 2 * M, panel += 32)
      for (int part = 0; part < PARTS; ++part) {
        const Ints pairs = __builtin_convertvector(at<Shorts>(panel, part), Ints);
        add<M>(x, floats(pairs << 24 >> 24), floats(pairs >> 8), sums[part]);
      }
    for (int part = 0; part < PARTS; ++part) {
      for (Floats& sum : sums[part]) sum *= at<Floats>(panel, part);
      put<M>(sums[part], part, out);
    }
  }

  template <int M>
  static INLINE void int4_rows(const Call& c, const bf16* x, const float* x_sums, const uint8_t* panel, float* out) {
    const int64_t n_groups = c.K / c.G;
    Floats totals[PARTS][M] = {};
    for (int64_t g = 0; g < n_groups; ++g, panel += 64) {
      Floats sums[PARTS][M] = {};
      for (int64_t i = 0; i < c.G; i += 8, x += 8 * M, panel += 64)
        for (int part = 0; part < PARTS; ++part) {
          const Words words = at<Words>(panel, part);
          for (int j = 0; j < 4; ++j)
            add<M>(x + 2 * M * j, floats((Ints)(words >> (4 * j) & 0xF)), floats((Ints)(words >> (4 * j + 16) & 0xF)), sums[part]);
        }
      for (int part = 0; part < PARTS; ++part) {
        const Words pairs = at<Words>(panel, part);
        const Floats scales = low(pairs), lowest = high(pairs) - 8 * scales;  // what q = 0 stands for
        for (int m = 0; m < M; ++m) totals[part][m] += scales * sums[part][m] + lowest * x_sums[m * n_groups + g];
      }
    }
    for (int part = 0; part < PARTS; ++part) put<M>(totals[part], part, out);
  }
};

// `function<rows>(...)` for up to so many rows at a time; the first is m.
#define UP_TO_4(function, ...)               \
  case 1: function<1>(__VA_ARGS__); break;   \
  case 2: function<2>(__VA_ARGS__); break;   \
  case 3: function<3>(__VA_ARGS__); break;   \
  case 4: function<4>(__VA_ARGS__); break;
#define UP_TO_4_ROWS(function, ...) \
  for (int64_t m = 0; m < c.M; m += 4) switch (std::min<int64_t>(c.M - m, 4)) { UP_TO_4(function, __VA_ARGS__) }
#define UP_TO_8_ROWS(function, ...)                                             \
  for (int64_t m = 0; m < c.M; m += 8) switch (std::min<int64_t>(c.M - m, 8)) { \
      UP_TO_4(function, __VA_ARGS__)                                            \
      case 5: function<5>(__VA_ARGS__); break;                                  \
      case 6: function<6>(__VA_ARGS__); break;                                  \
      case 7: function<7>(__VA_ARGS__); break;                                  \
      case 8: function<8>(__VA_ARGS__); break;                                  \
    }
#define FEW_ROWS c, c.pairs + m * c.K, c.sums + m * (c.K / c.G), panel, out + m * LANES

#if defined(__x86_64__)
#include "cpu_avx512.h"
#include "cpu_attention.h"

#define AVX2 __attribute__((target("avx2,fma")))
AVX2 void bf16_avx2(const Call& c, const uint8_t* panel, float* out) { UP_TO_4_ROWS(Portable<8>::bf16_rows, FEW_ROWS) }
AVX2 void int8_avx2(const Call& c, const uint8_t* panel, float* out) { UP_TO_4_ROWS(Portable<8>::int8_rows, FEW_ROWS) }
AVX2 void int4_avx2(const Call& c, const uint8_t* panel, float* out) { UP_TO_4_ROWS(Portable<8>::int4_rows, FEW_ROWS) }
AVX2 void bf16_values_avx2(const uint8_t* panel, int64_t K, int64_t, bf16* out) { bf16_values(panel, K, out); }
AVX2 void int8_values_avx2(const uint8_t* panel, int64_t K, int64_t, bf16* out) { int8_values(panel, K, out); }
AVX2 void int4_values_avx2(const uint8_t* panel, int64_t K, int64_t G, bf16* out) { int4_values(panel, K, G, out); }
ROWS(avx512, AVX512)
ROWS(avx2, AVX2)
#endif
ROWS(portable, )

void bf16_portable(const Call& c, const uint8_t* panel, float* out) { UP_TO_4_ROWS(Portable<4>::bf16_rows, FEW_ROWS) }
void int8_portable(const Call& c, const uint8_t* panel, float* out) { UP_TO_4_ROWS(Portable<4>::int8_rows, FEW_ROWS) }
void int4_portable(const Call& c, const uint8_t* panel, float* out) { UP_TO_4_ROWS(Portable<4>::int4_rows, FEW_ROWS) }
void bf16_values_portable(const uint8_t* panel, int64_t K, int64_t, bf16* out) { bf16_values(panel, K, out); }
void int8_values_portable(const uint8_t* panel, int64_t K, int64_t, bf16* out) { int8_values(panel, K, out); }
void int4_values_portable(const uint8_t* panel, int64_t K, int64_t G, bf16* out) { int4_values(panel, K, G, out); }

// ---- What this processor has.

struct Functions {
  const char* name;
  int64_t rows_at_once;                                 // of x, in `few`
  void (*few[3])(const Call&, const uint8_t*, float*);  // by kind: few rows, one panel
  void (*many[3])(const Call&, int64_t, int64_t);       // many rows, a range of panels; null: the values for at::mm
  void (*values[3])(const uint8_t*, int64_t, int64_t, bf16*);
  void (*normalize)(const bf16*, const bf16*, float, int64_t, bf16*);
  void (*add)(const bf16*, int64_t, bf16*);
  void (*gate)(const bf16*, int64_t, bf16*);
  void (*attend[2])(const Attention&, int64_t, int64_t, int64_t, int64_t, float*, float*, float*);  // bf16, int8
};

const std::vector<Functions>& available() {  // the best comes first
  static const std::vector<Functions> found = [] {
    std::vector<Functions> list;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
      list.push_back({"avx512", 8, {bf16_avx512, int8_avx512, int4_avx512},
                      {many_avx512<BF16>, many_avx512<INT8>, many_avx512<INT4>}, {}, ROW_FUNCTIONS(avx512),
                      {attend_avx512<bf16>, attend_avx512<int8_t>}});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      list.push_back({"avx2", 4, {bf16_avx2, int8_avx2, int4_avx2}, {}, {bf16_values_avx2, int8_values_avx2, int4_values_avx2},
                      ROW_FUNCTIONS(avx2), {}});
#endif
    list.push_back({"portable", 4, {bf16_portable, int8_portable, int4_portable}, {},
                    {bf16_values_portable, int8_values_portable, int4_values_portable}, ROW_FUNCTIONS(portable), {}});
    return list;
  }();
  return found;
}

Functions chosen = available().front();

// ---- The operators.

int64_t panels(int64_t N) { return (N + LANES - 1) / LANES; }

// `work(i)` for every i below n. Each thread has a range of its own, which it goes through from its first to its last;
// one that is done takes the second half of what another has left, for cores are never equally fast: a decoded token of
// 1.1B weights on two of them takes 6 % less than with equal shares in bf16 and int8, 2 % less in int4.
template <class Work>
void share_out(int64_t n, const Work& work) {
  struct alignas(64) Range {
    std::atomic<uint64_t> bounds;
  };
  const auto pack = [](uint64_t first, uint64_t end) { return first << 32 | end; };
  const int64_t n_threads = std::min<int64_t>(n, at::get_num_threads());
  std::vector<Range> ranges(n_threads);
  for (int64_t t = 0; t < n_threads; ++t) ranges[t].bounds = pack(n * t / n_threads, n * (t + 1) / n_threads);
  const auto run = [&](int64_t t) {
    for (int64_t from = t; from < t + n_threads;) {
      std::atomic<uint64_t>& bounds = ranges[from % n_threads].bounds;
      uint64_t seen = bounds;
      const uint64_t first = seen >> 32, end = uint32_t(seen);
      if (first == end) {
        ++from;
      } else if (from == t) {
        if (bounds.compare_exchange_weak(seen, pack(first + 1, end))) work(int64_t(first));
      } else if (const uint64_t middle = (first + end) / 2; bounds.compare_exchange_weak(seen, pack(first, middle))) {
        ranges[t].bounds = pack(middle, end);
        from = t;
      }
    }
  };
  at::parallel_for(0, n_threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) run(t);
  });
}

// y = x W^T of many rows: the panels as bf16 rows, as many as the cache holds, and a product of matrices.
void by_matrices(Kind kind, const Call& c, const at::Tensor& x, at::Tensor& y) {
  const int64_t bytes = panel_bytes(kind, c.K, c.G), at_once = std::max<int64_t>(1, SCRATCH / (LANES * c.K));
  at::Tensor scratch = at::empty({std::min(at_once, panels(c.N)) * LANES, c.K}, x.options());
  bf16* rows = static_cast<bf16*>(scratch.data_ptr());
  for (int64_t p = 0; p < panels(c.N); p += at_once) {
    const int64_t n = std::min(at_once, panels(c.N) - p);
    at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) chosen.values[kind](c.w + (p + i) * bytes, c.K, c.G, rows + i * LANES * c.K);
    });
    const int64_t n_rows = std::min(n * LANES, c.N - p * LANES);
    y.narrow(1, p * LANES, n_rows).copy_(at::mm(x, scratch.narrow(0, 0, n_rows).t()));
  }
}

void few_rows(Kind kind, Call c) {
  std::vector<bf16> pairs(c.M > 1 ? c.M * c.K : 0);
  for (int64_t first = 0; first < c.M && c.M > 1; first += chosen.rows_at_once) {
    const int64_t n = std::min(chosen.rows_at_once, c.M - first);
    for (int64_t i = 0; i < c.K / 2; ++i)
      for (int64_t m = 0; m < n; ++m)
        std::memcpy(&pairs[first * c.K + 2 * (i * n + m)], c.x + (first + m) * c.K + 2 * i, 4);
  }
  c.pairs = c.M > 1 ? pairs.data() : c.x;
  std::vector<float> sums(kind == INT4 ? c.M * (c.K / c.G) : 0);
  for (size_t g = 0; g < sums.size(); ++g) {
    float lanes[LANES] = {0};  // 16 sums side by side, or each addition waits for the one before
    for (int64_t i = 0; i < c.G; i += LANES)
      for (int64_t r = 0; r < LANES; ++r) lanes[r] += to_float(c.x[g * c.G + i + r]);
    for (float lane : lanes) sums[g] += lane;
  }
  c.sums = sums.data();
  share_out(panels(c.N), [&](int64_t p) {
    float out[MAX_ROWS * LANES];
    chosen.few[kind](c, c.w + p * panel_bytes(kind, c.K, c.G), out);
    store(c, p, out);
  });
}

void many_rows(Kind kind, Call c) {
  const int64_t n_rows = c.M;
  for (int64_t first = 0; first < n_rows; first += ROWS_AT_ONCE, c.x += c.M * c.K, c.y += c.M * c.N) {
    c.M = std::min(n_rows - first, ROWS_AT_ONCE);
    share_out((panels(c.N) + 1) / 2, [&](int64_t i) { chosen.many[kind](c, 2 * i, std::min(2 * i + 2, panels(c.N))); });
  }
}

// `work(m)` for every row m; few rows are not worth a second thread.
template <class Work>
void by_rows(int64_t n_rows, int64_t columns, const Work& work) {
  at::parallel_for(0, n_rows, std::max<int64_t>(1, 32768 / columns), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) work(m);
  });
}

// What a Linear's neighbours ask of its kernel beside the product; the Python modules in model.py say what it means.
struct Around {
  const std::optional<at::Tensor>&bias, &norm;  // [N], [K]
  double eps;
  const std::optional<at::Tensor>& residual;  // [M, N]
  bool gated;
};

const bf16* bf16_data(const at::Tensor& x, at::IntArrayRef sizes, const char* name) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && x.is_contiguous() && x.sizes() == sizes, name, " must be bfloat16 ", sizes,
              ", contiguous, not ", x.scalar_type(), " ", x.sizes());
  return static_cast<const bf16*>(x.const_data_ptr());
}

at::Tensor multiply(Kind kind, const at::Tensor& x_any, const at::Tensor& packed, int64_t N, int64_t G, const Around& around) {
  TORCH_CHECK(x_any.dim() == 2 && x_any.scalar_type() == at::kBFloat16, "x must be bfloat16 [M, K]");
  const int64_t M = x_any.size(0), K = x_any.size(1), expected = panels(N) * panel_bytes(kind, K, G);
  TORCH_CHECK(packed.scalar_type() == at::kByte, "the weight is ", packed.scalar_type(), ", not packed in bytes");
  TORCH_CHECK(packed.is_contiguous() && int64_t(packed.nbytes()) == expected, "the weight has ", packed.nbytes(),
              " bytes, not ", expected);
  TORCH_CHECK(!around.gated || (N % 2 == 0 && !around.residual), "gates are as many as what they let through, with no residual");
  at::Tensor x = x_any.contiguous(), y = at::empty({M, N}, x.options());
  if (around.norm) {
    const bf16 *weight = bf16_data(*around.norm, {K}, "the norm"), *from = static_cast<const bf16*>(x.const_data_ptr());
    x = at::empty({M, K}, x.options());
    bf16* to = static_cast<bf16*>(x.data_ptr());
    by_rows(M, K, [&](int64_t m) { chosen.normalize(from + m * K, weight, float(around.eps), K, to + m * K); });
  }
  bf16* out = static_cast<bf16*>(y.data_ptr());
  const Call c{static_cast<const bf16*>(x.const_data_ptr()), static_cast<const uint8_t*>(packed.const_data_ptr()), out,
               nullptr, nullptr, M, N, K, G};
  if (M <= MAX_ROWS)
    few_rows(kind, c);
  else if (chosen.many[kind])
    many_rows(kind, c);
  else
    by_matrices(kind, c, x, y);
  if (around.bias) {
    const bf16* bias = bf16_data(*around.bias, {N}, "the bias");
    by_rows(M, N, [&](int64_t m) { chosen.add(bias, N, out + m * N); });
  }
  if (around.residual) {
    const bf16* residual = bf16_data(*around.residual, {M, N}, "the residual");
    by_rows(M, N, [&](int64_t m) { chosen.add(residual + m * N, N, out + m * N); });
  }
  if (!around.gated) return y;
  at::Tensor gated = at::empty({M, N / 2}, x.options());
  bf16* to = static_cast<bf16*>(gated.data_ptr());
  by_rows(M, N, [&](int64_t m) { chosen.gate(out + m * N, N / 2, to + m * (N / 2)); });
  return gated;
}

using Maybe = std::optional<at::Tensor>;
at::Tensor bf16_linear(const at::Tensor& x, const at::Tensor& packed, int64_t N, const Maybe& bias, const Maybe& norm, double eps,
                       const Maybe& residual, bool gated) {
  return multiply(BF16, x, packed, N, 32, {bias, norm, eps, residual, gated});
}
at::Tensor int8_linear(const at::Tensor& x, const at::Tensor& packed, int64_t N, const Maybe& bias, const Maybe& norm, double eps,
                       const Maybe& residual, bool gated) {
  return multiply(INT8, x, packed, N, 32, {bias, norm, eps, residual, gated});
}
at::Tensor int4_linear(const at::Tensor& x, const at::Tensor& packed, int64_t N, int64_t G, const Maybe& bias, const Maybe& norm,
                       double eps, const Maybe& residual, bool gated) {
  TORCH_CHECK(G > 0 && G % 32 == 0 && x.size(-1) % G == 0, x.size(-1), " inputs do not fall into groups of ", G);
  return multiply(INT4, x, packed, N, G, {bias, norm, eps, residual, gated});
}

// Plain rows of bf16 [N, K] as panels; the rows that the last one lacks are zeros. It is done in squares of 16 pairs.
void pack_bf16(const at::Tensor& weight, at::Tensor& out) {
  const int64_t N = weight.size(0), K = weight.size(1), n_pairs = K / 2;
  TORCH_CHECK(weight.scalar_type() == at::kBFloat16 && weight.is_contiguous() && K % 2 == 0, "rows of bfloat16 pairs, please");
  TORCH_CHECK(int64_t(out.nbytes()) == panels(N) * panel_bytes(BF16, K, 1), "the panels have ", out.nbytes(), " bytes");
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
  m.def("pack_bf16(Tensor weight, Tensor(a!) out) -> ()");
  const std::string around = ", Tensor? bias=None, Tensor? norm=None, float eps=0, Tensor? residual=None, bool gated=False) -> Tensor";
  m.def(("bf16_linear(Tensor x, Tensor packed, int n_out" + around).c_str());
  m.def(("int8_linear(Tensor x, Tensor packed, int n_out" + around).c_str());
  m.def(("int4_linear(Tensor x, Tensor packed, int n_out, int groupsize" + around).c_str());
  m.def("decode_attention(Tensor q, Tensor k, Tensor v, Tensor positions, int window=0, Tensor? k_scales=None, "
        "Tensor? v_scales=None) -> Tensor");
  m.def("variant(str name) -> str", variant);
}

TORCH_LIBRARY_IMPL(fast, CPU, m) {
  m.impl("pack_bf16", pack_bf16);
  m.impl("int8_linear", int8_linear);
  m.impl("int4_linear", int4_linear);
  m.impl("bf16_linear", bf16_linear);
  m.impl("decode_attention", decode_attention);
}
