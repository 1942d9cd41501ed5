// Attention of a few positions over a KV cache with AVX-512; included by products.cpp. Reads the cache once, in order.
//
// Threads divide the cache in chunks of slots; partial softmaxes of a key head are combined by their greatest scores
// (flash decoding, Dao et al. 2023). A row is a query head at a position; up to 8 rows of one key head share each load.
// Both products multiply pairs of 16-bit numbers and add to 32 bits. A bf16 cache is used as it is; int8 is widened to
// int16, in one instruction (to bf16: five), with queries and softmax weights quantised to int16 by a scale per row.

constexpr int64_t TILE = 32;    // slots whose weighted values are summed in registers

template <class T>
constexpr bool quantized = sizeof(T) == 1;

// While keys are read, this prefetches the values of the same slots; while values are read, the keys of the next chunk.
INLINE_AVX512 void fetch_ahead(const void* x) { _mm_prefetch((const char*)x, _MM_HINT_T1); }

// Which of 32 elements of a slot belong to the head: `Whole`, all of them, if its size is a multiple of 32.
using Whole = std::true_type;
inline Whole held_from(int64_t, int64_t, Whole whole) { return whole; }
inline __mmask32 held_from(int64_t d, int64_t D, std::false_type) { return D - d >= 32 ? ~0u : (1u << (D - d)) - 1; }

// 32 elements of a slot, 16 bits each; zeros for those that are not held. (To load by a mask costs 7 % of the time.)
INLINE_AVX512 __m512i elements(const bf16* x, Whole) { return _mm512_loadu_si512(x); }
INLINE_AVX512 __m512i elements(const bf16* x, __mmask32 held) { return _mm512_maskz_loadu_epi16(held, x); }
INLINE_AVX512 __m512i elements(const int8_t* x, Whole) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)x)); }
INLINE_AVX512 __m512i elements(const int8_t* x, __mmask32 held) { return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(held, x)); }

template <class T>
INLINE_AVX512 __m512i add_products(__m512i sums, __m512i a, __m512i b) {
  if constexpr (quantized<T>) return _mm512_dpwssd_epi32(sums, a, b);
  return (__m512i)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
}

template <class T>
INLINE_AVX512 __m512i add(__m512i a, __m512i b) {
  if constexpr (quantized<T>) return _mm512_add_epi32(a, b);
  return (__m512i)_mm512_add_ps((__m512)a, (__m512)b);
}

template <class T>
INLINE_AVX512 __m512 floats(__m512i sums) {
  if constexpr (quantized<T>) return _mm512_cvtepi32_ps(sums);
  return (__m512)sums;
}

// Transposes 32 elements of four slots by 128-bit lanes: register j gets elements 8j .. 8j + 7 of each slot.
INLINE_AVX512 void exchange(__m512i (&x)[4]) {
  const __m512i a = _mm512_shuffle_i32x4(x[0], x[1], 0x44), b = _mm512_shuffle_i32x4(x[0], x[1], 0xEE);
  const __m512i c = _mm512_shuffle_i32x4(x[2], x[3], 0x44), d = _mm512_shuffle_i32x4(x[2], x[3], 0xEE);
  x[0] = _mm512_shuffle_i32x4(a, c, 0x88), x[1] = _mm512_shuffle_i32x4(a, c, 0xDD);
  x[2] = _mm512_shuffle_i32x4(b, d, 0x88), x[3] = _mm512_shuffle_i32x4(b, d, 0xDD);
}

// Scores of M rows for 16 slots from `slot` on; past `last`, it is repeated. Prefetches the same slots of `others`.
template <int M, class T, class MaybeWhole>
AVX512 void score(const T* keys, int64_t stride, int64_t slot, int64_t last, int64_t D, int64_t P, MaybeWhole whole,
                  const bf16* rows, int64_t first_row, float* out, const T* others) {
  __m512i sums[4][M];  // four slots each: a 128-bit lane has four partial sums of one slot
  rows += first_row * P, out += first_row * CHUNK;
  const int64_t ahead = others - keys;
  constexpr int64_t FOURS = M > 2 ? 2 : 1;  // groups of four slots that share each load of a row
#pragma GCC unroll 4
  for (int64_t i = 0; i < 4; i += FOURS) {
    const T* places[FOURS][4];
    for (int64_t j = 0; j < 4 * FOURS; ++j) places[j / 4][j % 4] = keys + std::min(slot + 4 * i + j, last) * stride;
    __m512i parts[FOURS][M];
    for (auto& four : parts)
      for (auto& part : four) part = _mm512_setzero_si512();
    for (int64_t d = 0; d < D; d += 32) {
      const auto held = held_from(d, D, whole);
      __m512i x[FOURS][4];
#pragma GCC unroll 2
      for (int64_t f = 0; f < FOURS; ++f) {
#pragma GCC unroll 4
        for (int64_t j = 0; j < 4; ++j) x[f][j] = elements(places[f][j] + d, held), fetch_ahead(places[f][j] + ahead + d);
        exchange(x[f]);
      }
#pragma GCC unroll 4
      for (int64_t j = 0; j < 4; ++j)
        for (int m = 0; m < M; ++m) {
          const __m512i q = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)(rows + m * P + d + 8 * j)));
          for (int64_t f = 0; f < FOURS; ++f) parts[f][m] = add_products<T>(parts[f][m], x[f][j], q);
        }
    }
    for (int64_t f = 0; f < FOURS; ++f)
      for (int m = 0; m < M; ++m) sums[i + f][m] = parts[f][m];
  }
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  for (int m = 0; m < M; ++m) {
    const __m512i a = add<T>(_mm512_unpacklo_epi32(sums[0][m], sums[1][m]), _mm512_unpackhi_epi32(sums[0][m], sums[1][m]));
    const __m512i b = add<T>(_mm512_unpacklo_epi32(sums[2][m], sums[3][m]), _mm512_unpackhi_epi32(sums[2][m], sums[3][m]));
    const __m512i sum = add<T>(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    _mm512_storeu_ps(out + m * CHUNK, floats<T>(_mm512_permutexvar_epi32(order, sum)));
  }
}

// Adds the values of a tile of slots times their weights [M, CHUNK] to the sums, out [M, D], and prefetches the same
// slots of `others`. Of each 32 sums the first 16 are for elements 0-3, 8-11, 16-19, 24-27, as unpacking leaves them.
template <int M, class T, class MaybeWhole>
AVX512 void add_values(const T* values, int64_t stride, int64_t slot, int64_t last, int64_t D, int64_t P, MaybeWhole whole,
                       const bf16* weights, int64_t first_row, __m512i* out, const T* others) {
  const int64_t ahead = others - values;
  weights += first_row * CHUNK, out += first_row * P / LANES;
  for (int64_t d = 0; d < D; d += 32) {
    const auto held = held_from(d, D, whole);
    __m512i low[M], high[M];
    for (int m = 0; m < M; ++m) low[m] = out[(m * P + d) / LANES], high[m] = out[(m * P + d) / LANES + 1];
    for (int64_t i = 0; i < TILE; i += 2) {
      const T* places[2] = {values + std::min(slot + i, last) * stride + d, values + std::min(slot + i + 1, last) * stride + d};
      const __m512i a = elements(places[0], held), b = elements(places[1], held);
      fetch_ahead(places[0] + ahead), fetch_ahead(places[1] + ahead);
      const __m512i x = _mm512_unpacklo_epi16(a, b), y = _mm512_unpackhi_epi16(a, b);
      for (int m = 0; m < M; ++m) {
        const __m512i weight = (__m512i)pair_everywhere(weights + m * CHUNK + i);
        low[m] = add_products<T>(low[m], x, weight), high[m] = add_products<T>(high[m], y, weight);
      }
    }
    for (int m = 0; m < M; ++m) out[(m * P + d) / LANES] = low[m], out[(m * P + d) / LANES + 1] = high[m];
  }
}

// 2^x for x <= 0, with a relative error of 3e-6: the integer part through the exponent, the rest by a Taylor series.
INLINE_AVX512 __m512 power_of_2(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-126.f), x);  // in this order NaN stays NaN
  const __m512 whole = _mm512_roundscale_ps(x, 0), rest = _mm512_sub_ps(x, whole);
  __m512 y = _mm512_set1_ps(1.3333558e-3f);
  for (float factor : {9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.f})
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(factor));
  return _mm512_scalef_ps(y, whole);
}

// Mask of the slots that a query at `position` sees, among the 16 from `slot` on.
inline __mmask16 seen(const Attention& c, int64_t slot, int64_t position) {
  const int64_t before = c.window ? std::clamp<int64_t>(position - c.window + 1 - slot, 0, LANES) : 0;
  const int64_t until = std::clamp<int64_t>(std::min(position + 1, c.L) - slot, 0, LANES);
  return __mmask16(((1 << until) - 1) & ~((1 << before) - 1));
}

struct Row {
  float best, total;  // the greatest scaled score so far, the sum of the weights
  float scale;        // a weight is 2^(score * scale - best)
};

// Turns a row's scores [CHUNK] of n slots into 16-bit weights. Returns the factor by which the row's sums so far must
// be multiplied, and the unit of the weights: a stored 1 means that much.
template <class T>
INLINE_AVX512 std::pair<float, float> weigh(const Attention& c, float* scores, int64_t first, int64_t n, int64_t position,
                                            const float* k_scales, const float* v_scales, Row& row, bf16* weights) {
  __m512 greatest = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
  __m512i top = _mm512_setzero_si512();  // bits of floats >= 0, as which NaN is the greatest
  const bool all = first + n <= std::min(position + 1, c.L) && (!c.window || first > position - c.window);
  const auto lanes_at = [&](int64_t i) { return all ? __mmask16(0xFFFF) : seen(c, first + i, position); };
  for (int64_t i = 0; i < n; i += LANES) {
    const __mmask16 lanes = lanes_at(i);
    __m512 score = _mm512_loadu_ps(scores + i);
    if (quantized<T>) {
      score = _mm512_mul_ps(score, _mm512_maskz_loadu_ps(lanes, k_scales + first + i));
      _mm512_storeu_ps(scores + i, score);
    }
    greatest = _mm512_mask_max_ps(greatest, lanes, greatest, score);
  }
  const float before = row.best;
  row.best = std::max(before, _mm512_reduce_max_ps(greatest) * row.scale);
  const __m512 base = _mm512_set1_ps(row.best == -INFINITY ? 0.f : row.best);
  for (int64_t i = 0; i < n; i += LANES) {
    const __mmask16 lanes = lanes_at(i);
    __m512 weight = power_of_2(_mm512_fmsub_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(row.scale), base));
    weight = _mm512_maskz_mov_ps(lanes, weight);
    sum = _mm512_add_ps(sum, weight);
    if (quantized<T>) {
      weight = _mm512_mul_ps(weight, _mm512_maskz_loadu_ps(lanes, v_scales + first + i));
      top = _mm512_max_epu32(top, (__m512i)weight);
      _mm512_storeu_ps(scores + i, weight);
    } else {
      _mm256_storeu_si256((__m256i*)(weights + i), (__m256i)_mm512_cvtneps_pbh(weight));
    }
  }
  const float factor = row.best == -INFINITY ? 1.f : std::exp2(before - row.best);
  row.total = row.total * factor + _mm512_reduce_add_ps(sum);
  if (!quantized<T>) return {factor, 1.f};
  const float unit = std::max(std::bit_cast<float>(_mm512_reduce_max_epu32(top)), 1e-30f) / 32767;
  for (int64_t i = 0; i < n; i += LANES) {
    const __m512 weight = _mm512_mul_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(1 / unit));
    _mm256_storeu_si256((__m256i*)(weights + i), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(weight)));
  }
  return {factor, unit};
}

// Quantises the queries of one key head to int16, with a scale for each row, which is NaN if a query is not finite.
inline void round_queries(const Attention& c, const bf16* q, bf16* rounded, Row* rows) {
  for (int64_t m = 0; m < c.M; ++m) {
    float top = 1e-30f, zero = 0;
    for (int64_t d = 0; d < c.D; ++d) {
      const float x = to_float(q[m * c.D + d]);
      top = std::max(top, std::abs(x)), zero += 0 * x;
    }
    for (int64_t d = 0; d < c.D; ++d) rounded[m * c.P + d] = bf16(int16_t(std::lrint(to_float(q[m * c.D + d]) * (32767 / top))));
    rows[m].scale = c.scale * (top / 32767) + zero;
  }
}

// Attention over slots begin .. end - 1 of a key head of batch row b. For each of its rows: the greatest score, best
// [M], the sum of the weights, total [M], and the weighted sum of the values, out [M, P].
template <class T, class MaybeWhole>
AVX512 void attend_slots(const Attention& c, int64_t b, int64_t head, int64_t begin, int64_t end, float* best, float* total,
                         float* out, MaybeWhole whole) {
  const bf16* q = c.q + (b * c.KV + head) * c.M * c.D;
  const T* keys = (const T*)c.k + b * c.k_strides[0] + head * c.k_strides[1];
  const T* values = (const T*)c.v + b * c.v_strides[0] + head * c.v_strides[1];
  const float* k_scales = c.k_scales + b * c.scale_strides[0] + head * c.scale_strides[1];
  const float* v_scales = c.v_scales + b * c.scale_strides[0] + head * c.scale_strides[1];
  std::vector<bf16> padded_q(quantized<T> || c.P > c.D ? c.M * c.P : 0), weights(c.M * CHUNK);
  std::vector<float> scores(c.M * CHUNK);
  std::vector<Row> rows(c.M, Row{-INFINITY, 0.f, c.scale});
  std::vector<std::pair<float, float>> factors(c.M);
  std::vector<float> room(c.M * c.P + LANES);
  __m512i* sums = (__m512i*)((uintptr_t(room.data()) + 63) / 64 * 64);
  const __m512i lower = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(8));
  if (quantized<T>)
    round_queries(c, q, padded_q.data(), rows.data());
  else if (c.P > c.D)
    for (int64_t m = 0; m < c.M; ++m) std::copy_n(q + m * c.D, c.D, padded_q.data() + m * c.P);
  if (!padded_q.empty()) q = padded_q.data();
  std::fill_n(out, c.M * c.P, 0.f);
  for (int64_t first = begin; first < end; first += CHUNK) {
    const int64_t n = std::min(CHUNK, end - first), padded = (n + TILE - 1) / TILE * TILE, last = end - 1;
    for (int64_t t = 0; t < n; t += LANES)
      UP_TO_8_ROWS(score, keys, c.k_strides[2], first + t, last, c.D, c.P, whole, q, m, scores.data() + t, values)
    for (int64_t m = 0; m < c.M; ++m)
      factors[m] = weigh<T>(c, scores.data() + m * CHUNK, first, padded, c.positions[b * c.S + m % c.S], k_scales, v_scales,
                            rows[m], weights.data() + m * CHUNK);
    std::fill_n(sums, c.M * c.P / LANES, _mm512_setzero_si512());
    for (int64_t t = 0; t < n; t += TILE)
      UP_TO_8_ROWS(add_values, values, c.v_strides[2], first + t, last, c.D, c.P, whole, weights.data() + t, m, sums,
                   keys + CHUNK * c.k_strides[2])
    for (int64_t i = 0; i < c.M * c.P; i += 2 * LANES) {
      const auto [factor, unit] = factors[i / c.P];
      for (int64_t h = 0; h < 2; ++h) {
        const __m512i sum = _mm512_permutex2var_epi32(sums[i / LANES], h ? upper : lower, sums[i / LANES + 1]);
        const __m512 so_far = _mm512_mul_ps(_mm512_loadu_ps(out + i + LANES * h), _mm512_set1_ps(factor));
        _mm512_storeu_ps(out + i + LANES * h, _mm512_fmadd_ps(floats<T>(sum), _mm512_set1_ps(unit), so_far));
      }
    }
  }
  for (int64_t m = 0; m < c.M; ++m) best[m] = rows[m].best, total[m] = rows[m].total;
}

template <class T>
AVX512 void attend_avx512(const Attention& c, int64_t b, int64_t head, int64_t begin, int64_t end, float* best, float* total,
                          float* out) {
  if (c.P == c.D)
    attend_slots<T>(c, b, head, begin, end, best, total, out, Whole());
  else
    attend_slots<T>(c, b, head, begin, end, best, total, out, std::false_type());
}
