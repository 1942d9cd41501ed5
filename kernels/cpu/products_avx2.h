// The products with 8-bit and 4-bit weights with AVX2; included by products.cpp, which explains the layouts.
//
// As with AVX-512 they multiply integers, but of 16 bits: inputs are not split into bytes. Four inputs lie in the order
// 0, 2, 1, 3, because a mask makes bytes 0 and 2 of a word of weights two 16-bit integers, and a shift bytes 1 and 3.

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define INLINE_AVX2 AVX2 __attribute__((always_inline)) inline

AVX2 void round_avx2(const bf16* x, int64_t K, int64_t G, int64_t rows, Group* groups, int8_t* out) {
  for (int64_t first = 0; first < K; first += INPUTS_PER_SCALE) {
    const int64_t last = std::min(K, first + INPUTS_PER_SCALE);
    bf16 greatest = 0;  // compared as bits: NaN is above every number, so it is kept
    for (int64_t i = first; i < last; ++i) greatest = std::max<bf16>(greatest, x[i] & 0x7FFF);
    const float top = std::max(to_float(greatest), 1e-30f);
    int32_t q[INPUTS_PER_SCALE];
    for (int64_t i = first; i < last; ++i) {
      const float shifted = to_float(x[i]) * (MAX_QUANTIZED_INPUT / top) + 12582912.f;  // its low bits are the rounded integer
      q[i - first] = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(12582912.f);
    }
    for (int64_t g = 0; g < last - first; g += G, ++groups) {
      int32_t total = 0;
      for (int64_t i = g; i < std::min(last - first, g + G); ++i) total += q[i];
      *groups = {float(total), top / MAX_QUANTIZED_INPUT};
    }
    for (int64_t i = 0; i < last - first; i += 4) {
      const int16_t four[4] = {int16_t(q[i]), int16_t(q[i + 2]), int16_t(q[i + 1]), int16_t(q[i + 3])};
      std::memcpy(out + 2 * rows * (first + i), four, 8);
    }
  }
}

// Adds the products of 32 weight bytes (8 outputs, 4 inputs) with a row's inputs to its sums.
template <int M>
INLINE_AVX2 void add_bytes(__m256i weights, const int8_t* x, __m256i (&sums)[M]) {
  const __m256i even = _mm256_and_si256(weights, _mm256_set1_epi32(0x00FF00FF)), odd = _mm256_srli_epi16(weights, 8);
  for (int m = 0; m < M; ++m) {
    int32_t pairs[2];
    std::memcpy(pairs, x + 8 * m, 8);
    sums[m] = _mm256_add_epi32(sums[m], _mm256_madd_epi16(even, _mm256_set1_epi32(pairs[0])));
    sums[m] = _mm256_add_epi32(sums[m], _mm256_madd_epi16(odd, _mm256_set1_epi32(pairs[1])));
  }
}

template <int M>
INLINE_AVX2 void int8_rows_avx2(const Call& c, const bf16* inputs, const Group* groups, const uint8_t* panel, float* out) {
  const int8_t* x = reinterpret_cast<const int8_t*>(inputs);
  const int64_t n = n_groups(c.K, c.G);
  __m256 totals[2][M] = {};
  for (int64_t g = 0; g < n; ++g) {
    __m256i sums[2][M] = {};
    for (int64_t i = g * c.G; i < std::min(c.K, (g + 1) * c.G); i += 4, x += 8 * M, panel += 64)
      for (int part = 0; part < 2; ++part) add_bytes<M>(_mm256_loadu_si256((const __m256i*)panel + part), x, sums[part]);
    for (int m = 0; m < M; ++m)
      for (int part = 0; part < 2; ++part) {
        const Group& group = groups[m * n + g];
        const __m256 sum = _mm256_sub_ps(_mm256_cvtepi32_ps(sums[part][m]), _mm256_set1_ps(128 * group.sum));
        totals[part][m] = _mm256_fmadd_ps(sum, _mm256_set1_ps(group.scale), totals[part][m]);
      }
  }
  for (int part = 0; part < 2; ++part, panel += 32)
    for (int m = 0; m < M; ++m)
      _mm256_storeu_ps(out + m * LANES + 8 * part, _mm256_mul_ps(totals[part][m], _mm256_loadu_ps((const float*)panel)));
}

// The fp16 in the low half of each word, as float.
INLINE_AVX2 __m256 halves_avx2(__m256i words) {
  const __m256i low = _mm256_and_si256(words, _mm256_set1_epi32(0xFFFF));
  return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
}

template <int M, int BITS>
INLINE_AVX2 void group_rows_avx2(Width<BITS> width, const Call& c, const bf16* inputs, const Group* groups, const uint8_t* panel, float* out) {
  const int8_t* x = reinterpret_cast<const int8_t*>(inputs);
  const __m256i four_bits = _mm256_set1_epi8(0xF), upper = _mm256_set1_epi32(int32_t(0xFFFF0000));
  const int64_t n = c.K / c.G;
  __m256 totals[2][M] = {};
  for (int64_t g = 0; g < n;) {
    const Group* first = groups + g;
    __m256 scaled[2][M] = {};  // sums of the groups whose inputs share this scale
    for (const int64_t end = std::min(n, g + INPUTS_PER_SCALE / c.G); g < end; ++g) {
      __m256i sums[2][M] = {};
      for (int64_t i = 0; i < c.G; i += width.IN_A_WORD, x += 2 * width.IN_A_WORD * M, panel += 64)
        for (int part = 0; part < 2; ++part) {
          const __m256i bytes = _mm256_loadu_si256((const __m256i*)panel + part);
          add_bytes<M>(BITS == 4 ? _mm256_and_si256(bytes, four_bits) : bytes, x, sums[part]);
          if (BITS == 4) add_bytes<M>(_mm256_and_si256(_mm256_srli_epi32(bytes, 4), four_bits), x + 8 * M, sums[part]);
        }
      for (int part = 0; part < 2; ++part, panel += 32) {
        const __m256i pairs = _mm256_loadu_si256((const __m256i*)panel);
        const bool is_half = c.pairs.is_half;
        const __m256 scales = is_half ? halves_avx2(pairs) : _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
        const __m256 zeros = is_half ? halves_avx2(_mm256_srli_epi32(pairs, 16)) : _mm256_castsi256_ps(_mm256_and_si256(pairs, upper));
        const __m256 lowest = lowest_weight(width, scales, zeros, c.pairs.zeros);
        for (int m = 0; m < M; ++m) {
          scaled[part][m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[part][m]), scales, scaled[part][m]);
          scaled[part][m] = _mm256_fmadd_ps(lowest, _mm256_set1_ps(groups[m * n + g].sum), scaled[part][m]);
        }
      }
    }
    for (int part = 0; part < 2; ++part)
      for (int m = 0; m < M; ++m)
        totals[part][m] = _mm256_fmadd_ps(scaled[part][m], _mm256_set1_ps(first[m * n].scale), totals[part][m]);
  }
  for (int part = 0; part < 2; ++part)
    for (int m = 0; m < M; ++m) _mm256_storeu_ps(out + m * LANES + 8 * part, totals[part][m]);
}
