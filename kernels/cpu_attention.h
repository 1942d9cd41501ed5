// Attention of a few positions over a KV cache with AVX-512; a part of cpu.cpp. Keys and values are read once, in order.
//
// The cache is cut into spans of slots that threads share out; what the spans found is put together by the greatest score
// in each (flash decoding, Dao et al. 2023). Rows are the query heads of one key head times their positions. Both products
// have the same form: a tile of 32 slots or of 32 elements lies as bf16 pairs, a register meets a broadcast pair of a row.

constexpr int64_t TILE = 32;     // slots
constexpr int64_t CHUNK = 256;   // slots whose scores are known before their values are read
constexpr int64_t SPAN = 1024;   // slots of one task

// rows [M, 2 n] times pairs [n, 32, 2], added to out [M, 32].
template <int M>
AVX512 void tile_rows(const bf16* pairs, int64_t n, const bf16* rows, int64_t stride, int64_t first, float* out,
                      int64_t out_stride) {
  rows += first * stride, out += first * out_stride;
  __m512 sums[M][2];
  for (int m = 0; m < M; ++m)
    for (int h = 0; h < 2; ++h) sums[m][h] = _mm512_loadu_ps(out + m * out_stride + LANES * h);
  for (int64_t i = 0; i < n; ++i) {
    const __m512bh a = pairs_at(pairs + 64 * i), b = pairs_at(pairs + 64 * i + 32);
    for (int m = 0; m < M; ++m) {
      const __m512bh inputs = pair_everywhere(rows + m * stride + 2 * i);
      sums[m][0] = _mm512_dpbf16_ps(sums[m][0], a, inputs);
      sums[m][1] = _mm512_dpbf16_ps(sums[m][1], b, inputs);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int h = 0; h < 2; ++h) _mm512_storeu_ps(out + m * out_stride + LANES * h, sums[m][h]);
}

// Blocks of D words change places across the diagonal; for D = 8, 4, 2, 1 together a 16 x 16 transposition.
template <int D>
INLINE_AVX512 void swap_blocks(__m512i (&rows)[16]) {
  constexpr __mmask16 upper = D == 8 ? 0xFF00 : D == 4 ? 0xF0F0 : D == 2 ? 0xCCCC : 0xAAAA;
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i left = _mm512_mask_add_epi32(lanes, upper, lanes, _mm512_set1_epi32(16 - D));
  const __m512i right = _mm512_mask_add_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(D)), upper, lanes, _mm512_set1_epi32(16));
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    if (!(i & D)) {
      const __m512i a = rows[i], b = rows[i + D];
      rows[i] = _mm512_permutex2var_epi32(a, left, b);
      rows[i + D] = _mm512_permutex2var_epi32(a, right, b);
    }
}

// Slot `at` of keys or values; the same place a tile later is on its way. Past the last slot it is the last one again.
INLINE_AVX512 __m512i slot_at(const bf16* slots, int64_t at, int64_t stride, int64_t last, int64_t d) {
  const bf16* place = slots + std::min(at, last) * stride + d;
  _mm_prefetch((const char*)(place + TILE * stride), _MM_HINT_T0);
  return _mm512_loadu_si512(place);
}

// Keys of 32 slots as pairs [D / 2, 32, 2].
AVX512 void key_pairs(const Attention& c, const bf16* keys, int64_t slot, bf16* pairs) {
  for (int64_t h = 0; h < 2; ++h)
    for (int64_t d = 0; d < c.D; d += 32) {
      __m512i rows[16];
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i)
        rows[i] = slot_at(keys, slot + 16 * h + i, c.k_strides[2], c.L - 1, d);
      swap_blocks<8>(rows), swap_blocks<4>(rows), swap_blocks<2>(rows), swap_blocks<1>(rows);
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(pairs + (d / 2 + i) * 64 + 32 * h, rows[i]);
    }
}

// Elements d .. d + 31 of the values of 32 slots as pairs [16, 32, 2].
AVX512 void value_pairs(const Attention& c, const bf16* values, int64_t slot, int64_t d, bf16* pairs) {
  uint16_t order[32];
  for (int i = 0; i < 16; ++i) order[2 * i] = i, order[2 * i + 1] = 32 + i;
  const __m512i low = _mm512_loadu_si512(order), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t i = 0; i < TILE; i += 2) {
    const __m512i a = slot_at(values, slot + i, c.v_strides[2], c.L - 1, d);
    const __m512i b = slot_at(values, slot + i + 1, c.v_strides[2], c.L - 1, d);
    _mm512_storeu_si512(pairs + 32 * i, _mm512_permutex2var_epi16(a, low, b));
    _mm512_storeu_si512(pairs + 32 * i + 32, _mm512_permutex2var_epi16(a, high, b));
  }
}

// 2^x for x <= 0, to 3e-6 of the result: the whole part by the exponent, the rest by a Taylor series.
INLINE_AVX512 __m512 power_of_2(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-126.f));
  const __m512 whole = _mm512_roundscale_ps(x, 0), rest = _mm512_sub_ps(x, whole);
  __m512 y = _mm512_set1_ps(1.3333558e-3f);
  for (float factor : {9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.f})
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(factor));
  return _mm512_scalef_ps(y, whole);
}

// One row's scores of a chunk become weights of its values, and what the row has so far is put to the new scale.
INLINE_AVX512 void weigh(const float* scores, const uint8_t* mask, float scale, int64_t D, bf16* weights, float* best,
                         float* total, float* out) {
  const __m512 none = _mm512_set1_ps(-INFINITY);
  __m512 scaled[CHUNK / LANES], greatest = none, sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < CHUNK / LANES; ++i) {
    const __m128i visible = _mm_loadu_si128((const __m128i*)(mask + LANES * i));
    const __m512 score = _mm512_mul_ps(_mm512_loadu_ps(scores + LANES * i), _mm512_set1_ps(scale));
    scaled[i] = _mm512_mask_blend_ps(_mm_test_epi8_mask(visible, visible), none, score);
    greatest = _mm512_max_ps(greatest, scaled[i]);
  }
  const float before = *best, now = std::max(before, _mm512_reduce_max_ps(greatest));
  const float base = now == -INFINITY ? 0.f : now;
  for (int64_t i = 0; i < CHUNK / LANES; ++i) {
    const __mmask16 visible = _mm512_cmp_ps_mask(scaled[i], none, _CMP_GT_OQ);
    const __m512 weight = _mm512_maskz_mov_ps(visible, power_of_2(_mm512_sub_ps(scaled[i], _mm512_set1_ps(base))));
    sum = _mm512_add_ps(sum, weight);
    _mm256_storeu_si256((__m256i*)(weights + LANES * i), (__m256i)_mm512_cvtneps_pbh(weight));
  }
  const float factor = std::exp2(before - base);
  *best = now;
  *total = *total * factor + _mm512_reduce_add_ps(sum);
  if (factor != 1)
    for (int64_t d = 0; d < D; ++d) out[d] *= factor;
}

// One span of one key head: for each of its rows the greatest score, the sum of the weights and the weighted values,
// best [M], total [M], out [M, D].
AVX512 void attend_avx512(const Attention& c, int64_t b, int64_t head, int64_t start, float* best, float* total, float* out) {
  const bf16* q = c.q + (b * c.KV + head) * c.M * c.D;
  const bf16* keys = c.k + b * c.k_strides[0] + head * c.k_strides[1];
  const bf16* values = c.v + b * c.v_strides[0] + head * c.v_strides[1];
  std::vector<bf16> pairs(TILE * c.D), weights(c.M * CHUNK);
  std::vector<float> scores(c.M * CHUNK);
  std::vector<uint8_t> mask(c.S * CHUNK);
  std::fill_n(best, c.M, -INFINITY), std::fill_n(total, c.M, 0.f), std::fill_n(out, c.M * c.D, 0.f);
  for (int64_t first = start; first < std::min(start + SPAN, c.L); first += CHUNK) {
    const int64_t n = std::min(CHUNK, c.L - first);
    bool live[CHUNK / TILE] = {false};
    std::fill(mask.begin(), mask.end(), 0), std::fill(scores.begin(), scores.end(), 0.f);
    for (int64_t s = 0; s < c.S; ++s) {
      std::memcpy(mask.data() + s * CHUNK, c.mask + (b * c.S + s) * c.L + first, n);
      for (int64_t t = 0; t < n; ++t) live[t / TILE] |= mask[s * CHUNK + t];
    }
    for (int64_t t = 0; t < CHUNK / TILE; ++t) {
      if (!live[t]) continue;
      key_pairs(c, keys, first + t * TILE, pairs.data());
      UP_TO_8_ROWS(tile_rows, pairs.data(), c.D / 2, q, c.D, m, scores.data() + t * TILE, CHUNK)
    }
    for (int64_t m = 0; m < c.M; ++m)
      weigh(scores.data() + m * CHUNK, mask.data() + m % c.S * CHUNK, c.scale, c.D, weights.data() + m * CHUNK, best + m,
            total + m, out + m * c.D);
    for (int64_t t = 0; t < CHUNK / TILE; ++t)
      for (int64_t d = 0; live[t] && d < c.D; d += 32) {
        value_pairs(c, values, first + t * TILE, d, pairs.data());
        UP_TO_8_ROWS(tile_rows, pairs.data(), TILE / 2, weights.data() + t * TILE, CHUNK, m, out + d, c.D)
      }
  }
}
