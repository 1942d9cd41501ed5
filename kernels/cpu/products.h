// What the CPU's operators (operators.cpp) and its kernels (products.cpp) share. They are two translation units because
// PyTorch's headers take as long to compile as the kernels: so the two compile in parallel.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

constexpr int64_t LANES = 16;    // rows of a panel: 32-bit lanes of a 512-bit register
constexpr int64_t INPUTS_PER_SCALE = 256;  // inputs that are quantised with one scale; group sizes must divide it
constexpr int64_t CHUNK = 256;   // slots of a cache at a time; above 512 the int32 sums over int8 values could overflow
using bf16 = uint16_t;
#define INLINE __attribute__((always_inline)) inline

inline float to_float(float x) { return x; }
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

enum Kind { BF16, INT8, GROUPS4, GROUPS8, FP8 };  // INT8: a scale per output; the others, of 4 or 8 bits: in groups
constexpr bool of_integers(Kind kind) { return kind != BF16 && kind != FP8; }

// What a group's pair of scale s and zero z means: bf16 or fp16, and whether the weights in the middle are z, z + 8 s or
// z s. Numbered as `kernels.kind_of_pairs` does, which adds 4 for fp16. FP8 has a float32 scale in its place.
enum Zeros { MIDDLE = 1, LOWEST, STEPS };
struct Pairs {
  bool is_half;
  Zeros zeros;
};
struct Ours {  // what quantize.py writes, known when compiling
  static constexpr bool is_half = false;
  static constexpr Zeros zeros = MIDDLE;
};

struct Group {  // G neighbouring inputs in a row of x
  float sum;    // of the inputs, or of the integers that `Kernels::round` makes of them
  float scale;  // with `round`: input = integer * scale
};

struct Call {
  const bf16* x;        // [M, K]
  const uint8_t* w;     // panels
  bf16* y;              // [M, N]
  const bf16* inputs;   // few rows: x in blocks of `rows_at_once` rows (the last may be smaller), each [K / 2, rows]
                        // pairs of neighbours; for weights of integers with `round`, [K / 4, rows, 8] bytes that it made
  const Group* groups;  // for weights of integers, few rows: [M, n_groups(K, G)]
  int64_t M, N, K, G;
  Pairs pairs;          // GROUPS4, GROUPS8
};

struct Attention {
  const bf16* q;        // [B, KV, M, D]; M = H / KV * S, query heads times positions
  const void *k, *v;    // bf16 or int8 [B, KV, L, D], with strides
  const float *k_scales, *v_scales;  // int8: [B, KV, L], with strides
  const int64_t* positions;          // [B, S]
  int64_t KV, M, S, L, D, window, k_strides[3], v_strides[3], scale_strides[2];
  int64_t P;            // D rounded up to whole registers: queries and sums are padded with zeros to it
  float scale;          // log2(e) / sqrt(D): a weight is 2^(score * scale)
};

inline int64_t n_groups(int64_t K, int64_t G) { return (K + G - 1) / G; }

inline int64_t panel_bytes(Kind kind, int64_t K, int64_t G) {
  const int64_t weights = kind == BF16 ? 2 * K : kind == GROUPS4 ? K / 2 : K;
  return LANES * (weights + 4 * (kind == BF16 ? 0 : kind == INT8 ? 1 : K / G));
}

// Rounds a panel's results, out [M, 16], to bf16 and writes them to its columns of y.
INLINE void store(const Call& c, int64_t panel, const float* out) {
  const int64_t n = std::min(LANES, c.N - panel * LANES);
  for (int64_t m = 0; m < c.M; ++m)
    for (int64_t r = 0; r < n; ++r) c.y[m * c.N + panel * LANES + r] = to_bf16(out[m * LANES + r]);
}

struct Kernels {  // the kernels for one instruction set
  const char* name;
  int64_t rows_at_once;  // rows of x in a block of Call::inputs
  // By Kind: few rows of x with one panel; many rows with a range of panels, null: `unpack` a panel, then at::mm.
  void (*few_rows[5])(const Call&, const uint8_t* panel, float* out);
  void (*many_rows[5])(const Call&, int64_t first_panel, int64_t end);
  void (*unpack[5])(const Call&, const uint8_t* panel, bf16* out);
  // Quantises a row of x, every G inputs a Group, for `rows` rows beside each other; null: x stays bf16.
  void (*round)(const bf16* x, int64_t K, int64_t G, int64_t rows, Group* groups, int8_t* out);
  void (*normalize)(const bf16* x, const void* weight, bool is_bf16, float eps, int64_t n, bf16* y);
  void (*add)(const bf16* x, int64_t n, bf16* y);
  void (*gate)(const bf16* x, int64_t n, bool gelu, bf16* y);
  void (*mix)(const bf16* x, const float* weights, int64_t k, int64_t n, bf16* y);
  // bf16, int8: slots begin .. end - 1 of a key head of row b; see attention_avx512.h.
  void (*attend[2])(const Attention&, int64_t b, int64_t head, int64_t begin, int64_t end, float* best, float* total, float* out);
};

const std::vector<Kernels>& available();  // the best comes first
