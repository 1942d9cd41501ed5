// Products of a few rows with bf16, fp8, 8-bit and 4-bit weights on a CPU, at the speed at which memory delivers the weights.
//
// Weights lie in panels of 16 rows, one row per lane: a register of weights is multiplied by a broadcast input, and no
// sum runs across lanes. Each thread reads its panels as one stream, scales included. Up to 8 rows of x (4 without
// AVX-512) share one read of a panel; more read it again, from the cache. Above 16 rows (prefill) AVX-512 unpacks parts
// of two panels to bf16; other processors unpack as many panels as the cache holds to plain rows for at::mm.
//
// A panel of bf16:  K/2 times 64 bytes: row r's inputs 2i, 2i+1 at 4r.
// A panel of int8:  K/4 times 64 bytes: 128 + row r's inputs 4i .. 4i+3 at 4r .. 4r+3.  Then 16 float32 scales.
// In groups of 8 bits: as int8, but after each group 16 pairs of bf16 or fp16, (scale, zero).
// In groups of 4 bits: K/8 times 64 bytes: byte 4r+j has row r's input j in its low four bits, input j+4 in the high
//                   ones; 8 is added to each. After each group 16 pairs.
// A panel of fp8:   K/4 times 64 bytes: row r's inputs 4i, 4i+2, 4i+1, 4i+3 at 4r .. 4r+3, so that a mask or a shift
//                   leaves neighbours in the halves of a word. After each group 16 float32 scales.

#include "products.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <array>
#include <bit>
#include <cmath>
#include <utility>

namespace {

// ---- One panel unpacked to rows of bf16, for prefill without AVX-512.

template <int BITS>
struct Width {  // of a weight in a group
  static constexpr int IN_A_WORD = 32 / BITS, MASK = (1 << BITS) - 1;
  static constexpr float MIDDLE = 1 << (BITS - 1);  // is added to weights when they are stored
};

// The weight that is stored as 0 in a group whose scale and zero are s and z.
template <int BITS, typename Floats>
INLINE Floats lowest_weight(Width<BITS> width, Floats s, Floats z, Zeros zeros) {
  if (zeros == STEPS) return (z - width.MIDDLE) * s;
  return z - (zeros == LOWEST ? width.MIDDLE - 8 : width.MIDDLE) * s;
}

INLINE float half_to_float(uint16_t half) {  // 2^112 moves the exponent's bias, and makes subnormal numbers normal
  const float size = std::bit_cast<float>(uint32_t(half & 0x7FFF) << 13) * 5.192296858534828e33f;
  return half & 0x8000 ? -size : size;
}

constexpr auto FP8_VALUES = [] {  // of every byte; NaN becomes 480
  std::array<float, 256> values{};
  for (uint32_t i = 0; i < 256; ++i) values[i] = std::bit_cast<float>((i & 0x7F) << 20) * (i < 128 ? 0x1p120f : -0x1p120f);  // as above
  return values;
}();

INLINE void bf16_values(const Call& c, const uint8_t* panel, bf16* out) {  // out [16, K]
  for (int64_t i = 0; i < c.K / 2; ++i)
    for (int64_t r = 0; r < LANES; ++r) std::memcpy(out + r * c.K + 2 * i, panel + 4 * (LANES * i + r), 4);
}

INLINE void int8_values(const Call& c, const uint8_t* panel, bf16* out) {
  float scales[LANES];
  std::memcpy(scales, panel + LANES * c.K, sizeof scales);
  for (int64_t r = 0; r < LANES; ++r)
    for (int64_t i = 0; i < c.K; ++i)
      out[r * c.K + i] = to_bf16((panel[LANES * (i / 4 * 4) + 4 * r + i % 4] - 128) * scales[r]);
}

template <int BITS>
INLINE void group_values(const Call& c, const uint8_t* panel, bf16* out) {
  constexpr Width<BITS> width;
  const int64_t bytes = LANES * c.G * BITS / 8;
  for (int64_t g = 0; g < c.K / c.G; ++g, panel += bytes + LANES * 4) {
    const uint16_t* pairs = reinterpret_cast<const uint16_t*>(panel + bytes);
    for (int64_t r = 0; r < LANES; ++r) {
      const auto number = [&](uint16_t bits) { return c.pairs.is_half ? half_to_float(bits) : to_float(bits); };
      const float scale = number(pairs[2 * r]);
      const float lowest = lowest_weight(width, scale, number(pairs[2 * r + 1]), c.pairs.zeros);
      bf16* row = out + r * c.K + g * c.G;
      for (int64_t i = 0; i < c.G / width.IN_A_WORD; ++i)
        for (int64_t j = 0; j < width.IN_A_WORD; ++j) {
          const int q = (panel[4 * (LANES * i + r) + j % 4] >> (j / 4 * 4)) & width.MASK;
          row[width.IN_A_WORD * i + j] = to_bf16(float(q) * scale + lowest);
        }
    }
  }
}

INLINE void fp8_values(const Call& c, const uint8_t* panel, bf16* out) {
  for (int64_t k = 0; k < c.K; k += c.G, panel += LANES * (c.G + 4)) {
    float scales[LANES];
    std::memcpy(scales, panel + LANES * c.G, sizeof scales);
    for (int64_t r = 0; r < LANES; ++r)
      for (int64_t i = 0; i < c.G; ++i) {
        const int place[4] = {0, 2, 1, 3};
        out[r * c.K + k + i] = to_bf16(FP8_VALUES[panel[LANES * (i / 4 * 4) + 4 * r + place[i % 4]]] * scales[r]);
      }
  }
}

// ---- Row operations before a product (RMSNorm) and after it (add, gate, mix): plain loops that the compiler vectorises.

INLINE float power_of_2(float x) {
  x = std::min(std::max(x, -126.f), 126.f);
  const float shifted = x + 12582912.f, f = x - (shifted - 12582912.f);  // 1.5 * 2^23: the low bits are x rounded
  float p = 0.00133335581f;                                             // 2^f on [-1/2, 1/2], Taylor
  p = p * f + 0.00961812911f;
  p = p * f + 0.0555041087f;
  p = p * f + 0.240226507f;
  p = p * f + 0.693147181f;
  p = p * f + 1.f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(p) + (std::bit_cast<uint32_t>(shifted) << 23));
}

template <typename Weight>
INLINE void normalize(const bf16* x, const Weight* weight, float eps, int64_t n, bf16* y) {  // RMSNorm
  float sums[LANES] = {0};
  for (int64_t i = 0; i + LANES <= n; i += LANES)
    for (int64_t r = 0; r < LANES; ++r) sums[r] += to_float(x[i + r]) * to_float(x[i + r]);
  for (int64_t i = n / LANES * LANES; i < n; ++i) sums[0] += to_float(x[i]) * to_float(x[i]);
  float sum = 0;
  for (float lane : sums) sum += lane;
  const float factor = 1 / std::sqrt(sum / n + eps);
  for (int64_t i = 0; i < n; ++i) y[i] = to_bf16(to_float(x[i]) * factor * to_float(weight[i]));
}

INLINE void normalize(const bf16* x, const void* weight, bool is_bf16, float eps, int64_t n, bf16* y) {
  if (is_bf16)
    normalize(x, static_cast<const bf16*>(weight), eps, n, y);
  else
    normalize(x, static_cast<const float*>(weight), eps, n, y);
}

INLINE void add(const bf16* x, int64_t n, bf16* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = to_bf16(to_float(y[i]) + to_float(x[i]));
}

INLINE void gate(const bf16* x, int64_t n, bool gelu, bf16* y) {  // SiLU or GELU of the first n, times the next n
  for (int64_t i = 0; i < n; ++i) {
    const float a = to_float(x[i]);
    const float z = gelu ? 1.59576912f * (a + 0.044715f * a * a * a) : a;  // (1 + tanh(z / 2)) / 2 is sigmoid(z)
    y[i] = to_bf16(a / (1 + power_of_2(z * -1.44269504f)) * to_float(x[n + i]));
  }
}

INLINE void mix(const bf16* x, const float* weights, int64_t k, int64_t n, bf16* y) {  // sum of k rows, weighted
  for (int64_t i = 0; i < n; i += LANES) {
    float sums[LANES] = {0};
    for (int64_t j = 0; j < k; ++j)
      for (int64_t r = 0; r < LANES; ++r) sums[r] += weights[j] * to_float(x[j * n + i + r]);
    for (int64_t r = 0; r < LANES; ++r) y[i + r] = to_bf16(sums[r]);
  }
}

#define ROWS(name, target)                                                                    \
  target void normalize_##name(const bf16* x, const void* weight, bool is_bf16, float eps, int64_t n, bf16* y) { normalize(x, weight, is_bf16, eps, n, y); } \
  target void add_##name(const bf16* x, int64_t n, bf16* y) { add(x, n, y); }                 \
  target void gate_##name(const bf16* x, int64_t n, bool gelu, bf16* y) { gate(x, n, gelu, y); } \
  target void mix_##name(const bf16* x, const float* weights, int64_t k, int64_t n, bf16* y) { mix(x, weights, k, n, y); }
#define ROW_FUNCTIONS(name) normalize_##name, add_##name, gate_##name, mix_##name

// ---- Portable products of M rows of x, stored as pairs `[K / 2, M]`, with one panel, whose 16 rows are the lanes of
// PARTS vectors as wide as the processor's.

template <int WIDTH>
struct Vectors;
#define VECTORS(width)                                                \
  template <>                                                         \
  struct Vectors<width> {                                             \
    using Floats = float __attribute__((vector_size(4 * width)));     \
    using Words = uint32_t __attribute__((vector_size(4 * width)));   \
    using Ints = int32_t __attribute__((vector_size(4 * width)));     \
  };
VECTORS(4)
VECTORS(8)

template <int WIDTH>
struct Portable {
  using Floats = typename Vectors<WIDTH>::Floats;
  using Words = typename Vectors<WIDTH>::Words;
  using Ints = typename Vectors<WIDTH>::Ints;
  static constexpr int PARTS = LANES / WIDTH;

  template <typename T>
  static INLINE T at(const uint8_t* panel, int part) {
    T vector;
    std::memcpy(&vector, panel + part * sizeof vector, sizeof vector);
    return vector;
  }

  static INLINE Floats low(Words pairs) { return (Floats)(pairs << 16); }  // each word is two bf16
  static INLINE Floats high(Words pairs) { return (Floats)(pairs & 0xFFFF0000); }
  static INLINE Floats half(Words words) {  // the fp16 in the low half of each, as `half_to_float`
    const Floats size = (Floats)((words & 0x7FFF) << 13) * 5.192296858534828e33f;
    return (Floats)((Words)size | (words & 0x8000) << 16);
  }
  // An unsigned bit field of each word, from bit `first` on, as float.
  static INLINE Floats bits(Words words, int first, uint32_t mask) {
    return __builtin_convertvector((Ints)(words >> first & mask), Floats);
  }

  static INLINE Floats fp8(Words words, int byte) {  // that byte of each word
    const Ints moved = (Ints)(words << (24 - 8 * byte)) >> 4;  // copies of the sign follow it
    return (Floats)(moved & int32_t(0x87F00000)) * 0x1p120f;
  }

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
  static INLINE void bf16_rows(const Call& c, const bf16* x, const Group*, const uint8_t* panel, float* out) {
    Floats sums[PARTS][M] = {};
    for (int64_t i = 0; i < c.K / 2; ++i, x += 2 * M, panel += 64)
      for (int part = 0; part < PARTS; ++part) {
        const Words pairs = at<Words>(panel, part);
        add<M>(x, low(pairs), high(pairs), sums[part]);
      }
    for (int part = 0; part < PARTS; ++part) put<M>(sums[part], part, out);
  }

  template <int M>
  static INLINE void int8_rows(const Call& c, const bf16* x, const Group* groups, const uint8_t* panel, float* out) {
    Floats sums[PARTS][M] = {};
    for (int64_t i = 0; i < c.K; i += 4, x += 4 * M, panel += 64)
      for (int part = 0; part < PARTS; ++part) {
        const Words words = at<Words>(panel, part);
        for (int j = 0; j < 4; j += 2) add<M>(x + M * j, bits(words, 8 * j, 0xFF), bits(words, 8 * j + 8, 0xFF), sums[part]);
      }
    for (int m = 0; m < M; ++m) {
      float sum = 0;
      for (int64_t g = 0; g < n_groups(c.K, c.G); ++g) sum += groups[m * n_groups(c.K, c.G) + g].sum;
      for (int part = 0; part < PARTS; ++part) sums[part][m] = (sums[part][m] - 128 * sum) * at<Floats>(panel, part);
    }
    for (int part = 0; part < PARTS; ++part) put<M>(sums[part], part, out);
  }

  template <int M, int BITS>
  static INLINE void group_rows(Width<BITS> width, const Call& c, const bf16* x, const Group* groups, const uint8_t* panel, float* out) {
    Floats totals[PARTS][M] = {};
    for (int64_t g = 0; g < c.K / c.G; ++g, panel += 64) {
      Floats sums[PARTS][M] = {};
      for (int64_t i = 0; i < c.G; i += width.IN_A_WORD, x += width.IN_A_WORD * M, panel += 64)
        for (int part = 0; part < PARTS; ++part) {
          const Words words = at<Words>(panel, part);
          for (int j = 0; j < width.IN_A_WORD; j += 2) {
            const int first = 8 * (j % 4) + 4 * (j / 4);
            add<M>(x + M * j, bits(words, first, width.MASK), bits(words, first + 8, width.MASK), sums[part]);
          }
        }
      for (int part = 0; part < PARTS; ++part) {
        const Words pairs = at<Words>(panel, part);
        const Floats scales = c.pairs.is_half ? half(pairs) : low(pairs);
        const Floats zeros = c.pairs.is_half ? half(pairs >> 16) : high(pairs);
        const Floats lowest = lowest_weight(width, scales, zeros, c.pairs.zeros);
        for (int m = 0; m < M; ++m) totals[part][m] += scales * sums[part][m] + lowest * groups[m * (c.K / c.G) + g].sum;
      }
    }
    for (int part = 0; part < PARTS; ++part) put<M>(totals[part], part, out);
  }

  template <int M>
  static INLINE void fp8_rows(const Call& c, const bf16* x, const Group*, const uint8_t* panel, float* out) {
    Floats totals[PARTS][M] = {};
    for (int64_t k = 0; k < c.K; k += c.G, panel += 64) {
      Floats sums[PARTS][M] = {};
      for (int64_t i = 0; i < c.G; i += 4, x += 4 * M, panel += 64)
        for (int part = 0; part < PARTS; ++part) {
          const Words words = at<Words>(panel, part);
          for (int j = 0; j < 2; ++j) add<M>(x + 2 * M * j, fp8(words, j), fp8(words, j + 2), sums[part]);
        }
      for (int part = 0; part < PARTS; ++part)
        for (int m = 0; m < M; ++m) totals[part][m] += at<Floats>(panel, part) * sums[part][m];
    }
    for (int part = 0; part < PARTS; ++part) put<M>(totals[part], part, out);
  }
};

// Calls `function<rows>(...)` for all rows of x, up to 4 or 8 at a time; m is the first of them.
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
#define FEW_ROWS c, c.inputs + m * c.K, c.groups + m * n_groups(c.K, c.G), panel, out + m * LANES

// With weights of integers AVX-512 and AVX2 multiply integers: on AVX-512 that takes a quarter of the instructions of
// converting int8 to bf16. Inputs are quantised to 16 bits, with a scale for each 256. Even if one of these is 16 times
// their root mean square, the most possible, the relative error is 1.4e-4, a fourteenth of bf16's rounding. Weights are
// stored with an offset (128 or 8); offset times the sum of the inputs is subtracted afterwards.
constexpr float MAX_QUANTIZED_INPUT = 32639;  // 127 * 256 + 127, so that both bytes fit int8

#if defined(__x86_64__)
#include "products_avx2.h"
#include "products_avx512.h"
#include "attention_avx512.h"

AVX2 void bf16_avx2(const Call& c, const uint8_t* panel, float* out) { UP_TO_4_ROWS(Portable<8>::bf16_rows, FEW_ROWS) }
AVX2 void int8_avx2(const Call& c, const uint8_t* panel, float* out) { UP_TO_4_ROWS(int8_rows_avx2, FEW_ROWS) }
template <int BITS>
AVX2 void groups_avx2(const Call& c, const uint8_t* panel, float* out) { UP_TO_4_ROWS(group_rows_avx2, Width<BITS>(), FEW_ROWS) }
AVX2 void fp8_avx2(const Call& c, const uint8_t* panel, float* out) { UP_TO_4_ROWS(Portable<8>::fp8_rows, FEW_ROWS) }
AVX2 void bf16_values_avx2(const Call& c, const uint8_t* panel, bf16* out) { bf16_values(c, panel, out); }
AVX2 void int8_values_avx2(const Call& c, const uint8_t* panel, bf16* out) { int8_values(c, panel, out); }
template <int BITS>
AVX2 void group_values_avx2(const Call& c, const uint8_t* panel, bf16* out) { group_values<BITS>(c, panel, out); }
AVX2 void fp8_values_avx2(const Call& c, const uint8_t* panel, bf16* out) { fp8_values(c, panel, out); }
ROWS(avx512, AVX512)
ROWS(avx2, AVX2)
#endif
ROWS(portable, )

void bf16_portable(const Call& c, const uint8_t* panel, float* out) { UP_TO_4_ROWS(Portable<4>::bf16_rows, FEW_ROWS) }
void int8_portable(const Call& c, const uint8_t* panel, float* out) { UP_TO_4_ROWS(Portable<4>::int8_rows, FEW_ROWS) }
template <int BITS>
void groups_portable(const Call& c, const uint8_t* panel, float* out) { UP_TO_4_ROWS(Portable<4>::group_rows, Width<BITS>(), FEW_ROWS) }
void fp8_portable(const Call& c, const uint8_t* panel, float* out) { UP_TO_4_ROWS(Portable<4>::fp8_rows, FEW_ROWS) }

}  // namespace

const std::vector<Kernels>& available() {
  static const std::vector<Kernels> found = [] {
    std::vector<Kernels> list;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi"))
      list.push_back({"avx512", 8, {bf16_avx512, int8_avx512, groups_avx512<4>, groups_avx512<8>, fp8_avx512},
                      {many_avx512<BF16>, many_avx512<INT8>, many_avx512<GROUPS4>, many_avx512<GROUPS8>, many_avx512<FP8>}, {}, round_avx512, ROW_FUNCTIONS(avx512),
                      {attend_avx512<bf16>, attend_avx512<int8_t>}});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      list.push_back({"avx2", 4, {bf16_avx2, int8_avx2, groups_avx2<4>, groups_avx2<8>, fp8_avx2}, {},
                      {bf16_values_avx2, int8_values_avx2, group_values_avx2<4>, group_values_avx2<8>, fp8_values_avx2}, round_avx2, ROW_FUNCTIONS(avx2), {}});
#endif
    list.push_back({"portable", 4, {bf16_portable, int8_portable, groups_portable<4>, groups_portable<8>, fp8_portable}, {},
                    {bf16_values, int8_values, group_values<4>, group_values<8>, fp8_values}, nullptr, ROW_FUNCTIONS(portable), {}});
    return list;
  }();
  return found;
}
