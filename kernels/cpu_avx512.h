// The products with AVX-512 and its bf16 dot product; a part of cpu_kernels.cpp, which explains the layouts.

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma")))
#define INLINE_AVX512 AVX512 __attribute__((always_inline)) inline

INLINE_AVX512 __m512bh pairs_at(const void* x) { return (__m512bh)_mm512_loadu_si512(x); }
INLINE_AVX512 __m512bh pair_everywhere(const bf16* x) {  // two neighbours of x in every lane
  int32_t both;
  std::memcpy(&both, x, 4);
  return (__m512bh)_mm512_set1_epi32(both);
}

// Where there is much to do per cache line, the processor does not look far enough ahead.
INLINE_AVX512 void fetch(const void* weights) { _mm_prefetch((const char*)weights + 4096, _MM_HINT_NTA); }

// int8 to bf16 by way of float32: 8 bits of magnitude are more than a bf16's 7 behind the leading one, so no bit trick.
INLINE_AVX512 __m512bh int8_pairs(const uint8_t* q) {
  const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)q)));
  const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(q + 16))));
  return _mm512_cvtne2ps_pbh(high, low);
}

// bf16 or int8: M rows of x, `x [K / 2, M]` pairs, with one panel.
template <int M, bool INT8>
INLINE_AVX512 void plain_rows(const Call& c, const bf16* x, const uint8_t* panel, float* out) {
  constexpr int CHAINS = M > 2 ? 1 : 4 / M;  // enough sums at once to hide the latency of adding to one
  constexpr int64_t BYTES = INT8 ? 32 : 64;
  __m512 sums[CHAINS][M];
  for (auto& chain : sums)
    for (auto& sum : chain) sum = _mm512_setzero_ps();
  const int64_t pairs = c.K / 2;
  const auto add = [&](int64_t i, __m512* to) AVX512 {
    const __m512bh w = INT8 ? int8_pairs(panel + BYTES * i) : pairs_at(panel + BYTES * i);
    for (int m = 0; m < M; ++m) to[m] = _mm512_dpbf16_ps(to[m], w, pair_everywhere(x + 2 * (i * M + m)));
  };
  int64_t i = 0;
  for (; i + CHAINS <= pairs; i += CHAINS)
    for (int a = 0; a < CHAINS; ++a) {
      if (INT8 ? (i + a) % 2 == 0 : M > 1) fetch(panel + BYTES * (i + a));
      add(i + a, sums[a]);
    }
  for (; i < pairs; ++i) add(i, sums[0]);
  const __m512 scales = INT8 ? _mm512_loadu_ps(panel + LANES * c.K) : _mm512_set1_ps(1.f);
  for (int m = 0; m < M; ++m) {
    for (int a = 1; a < CHAINS; ++a) sums[0][m] = _mm512_add_ps(sums[0][m], sums[a][m]);
    _mm512_storeu_ps(out + m * LANES, _mm512_mul_ps(sums[0][m], scales));
  }
}

template <int M>
AVX512 void bf16_rows(const Call& c, const bf16* x, const float*, const uint8_t* panel, float* out) {
  plain_rows<M, false>(c, x, panel, out);
}

template <int M>
AVX512 void int8_rows(const Call& c, const bf16* x, const float*, const uint8_t* panel, float* out) {
  plain_rows<M, true>(c, x, panel, out);
}

// 0x4300 | q is 128 + q in bf16: four bits become a number by one shift and one logical operation. What is added that
// way, 128, and the 8 of q - 8 leave again through the group's sum of x, from which its accumulator starts.
template <int M>
AVX512 void int4_rows(const Call& c, const bf16* x, const float* x_sums, const uint8_t* panel, float* out) {
  constexpr int CHAINS = M > 2 ? 2 : 4 / M;
  const __m512i low = _mm512_set1_epi32(0x000F000F), magic = _mm512_set1_epi32(0x43004300);
  const int64_t n_groups = c.K / c.G;
  __m512 totals[M];
  for (auto& total : totals) total = _mm512_setzero_ps();
  for (int64_t g = 0; g < n_groups; ++g) {
    __m512 sums[CHAINS][M];
    for (int m = 0; m < M; ++m) {
      sums[0][m] = _mm512_set1_ps(-136.f * x_sums[m * n_groups + g]);
      for (int a = 1; a < CHAINS; ++a) sums[a][m] = _mm512_setzero_ps();
    }
    for (int64_t i = 0; i < c.G; i += 8, panel += LANES * 4) {
      fetch(panel);
      const __m512i words = _mm512_loadu_si512(panel);
#define FOUR_BITS(j)                                                                                              \
  {                                                                                                               \
    const __m512i bits = _mm512_ternarylogic_epi32(_mm512_srli_epi32(words, 4 * j), low, magic, 0xEA);             \
    for (int m = 0; m < M; ++m)                                                                                   \
      sums[j % CHAINS][m] = _mm512_dpbf16_ps(sums[j % CHAINS][m], (__m512bh)bits,                                 \
                                             pair_everywhere(x + M * (g * c.G + i + 2 * j) + 2 * m));             \
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
  for (int m = 0; m < M; ++m) _mm512_storeu_ps(out + m * LANES, totals[m]);
}

// For many rows of x two panels at a time, K_AT_ONCE inputs of each unpacked to bf16 pairs, which then stay in the
// first-level cache for all rows.
constexpr int64_t K_AT_ONCE = 256;  // a multiple of every group size

INLINE_AVX512 void int8_unpack(const uint8_t* panel, int64_t n, bf16* pairs) {
  for (int64_t i = 0; i < n / 2; ++i) _mm512_storeu_si512(pairs + 32 * i, (__m512i)int8_pairs(panel + 32 * i));
}

INLINE_AVX512 void int4_unpack(const uint8_t* panel, int64_t n, int64_t G, bf16* pairs) {
  const __m512i four = _mm512_set1_epi32(0xF), high = _mm512_set1_epi32(int32_t(0xFFFF0000));
  for (int64_t g = 0; g < n / G; ++g, panel += LANES * G / 2 + LANES * 4) {
    const __m512i ends = _mm512_loadu_si512(panel + LANES * G / 2);
    const __m512 scales = _mm512_castsi512_ps(_mm512_slli_epi32(ends, 16));
    const __m512 zeros = _mm512_castsi512_ps(_mm512_and_si512(ends, high));
    const __m512 lowest = _mm512_fnmadd_ps(scales, _mm512_set1_ps(8.f), zeros);  // what q = 0 stands for
    for (int64_t i = 0; i < G / 8; ++i) {
      const __m512i words = _mm512_loadu_si512(panel + 64 * i);
      for (int j = 0; j < 4; ++j, pairs += 32) {
        const __m512i even = _mm512_and_si512(_mm512_srli_epi32(words, 4 * j), four);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(words, 4 * j + 16), four);
        const __m512 low = _mm512_fmadd_ps(_mm512_cvtepi32_ps(even), scales, lowest);
        const __m512 upper = _mm512_fmadd_ps(_mm512_cvtepi32_ps(odd), scales, lowest);
        const __m512i a = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low));
        const __m512i b = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(upper));
        _mm512_storeu_si512(pairs, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
      }
    }
  }
}

// `x [M, c.K]` times two panels' pairs for n inputs, added to out `[M, 16]` and `[c.M, 16]` further on.
template <int M>
AVX512 void pairs_rows(const Call& c, const bf16* x, const bf16* const* pairs, int64_t n, float* out) {
  __m512 sums[2][M];
  for (int h = 0; h < 2; ++h)
    for (int m = 0; m < M; ++m) sums[h][m] = _mm512_loadu_ps(out + (h * c.M + m) * LANES);
  for (int64_t i = 0; i < n / 2; ++i) {
    const __m512bh a = pairs_at(pairs[0] + 32 * i), b = pairs_at(pairs[1] + 32 * i);
    for (int m = 0; m < M; ++m) {
      const __m512bh inputs = pair_everywhere(x + m * c.K + 2 * i);
      sums[0][m] = _mm512_dpbf16_ps(sums[0][m], a, inputs);
      sums[1][m] = _mm512_dpbf16_ps(sums[1][m], b, inputs);
    }
  }
  for (int h = 0; h < 2; ++h)
    for (int m = 0; m < M; ++m) _mm512_storeu_ps(out + (h * c.M + m) * LANES, sums[h][m]);
}

AVX512 void bf16_avx512(const Call& c, const uint8_t* panel, float* out) { UP_TO_8_ROWS(bf16_rows, FEW_ROWS) }
AVX512 void int8_avx512(const Call& c, const uint8_t* panel, float* out) { UP_TO_8_ROWS(int8_rows, FEW_ROWS) }
AVX512 void int4_avx512(const Call& c, const uint8_t* panel, float* out) { UP_TO_8_ROWS(int4_rows, FEW_ROWS) }

template <Kind KIND>
AVX512 void many_avx512(const Call& c, int64_t begin, int64_t end) {
  const int64_t bytes = panel_bytes(KIND, c.K, c.G);
  std::vector<float> out(2 * c.M * LANES);
  std::vector<bf16> unpacked(KIND == BF16 ? 0 : 2 * K_AT_ONCE * LANES);
  for (int64_t p = begin; p < end; p += 2) {
    std::fill(out.begin(), out.end(), 0.f);
    for (int64_t k = 0; k < c.K; k += K_AT_ONCE) {
      const int64_t n = std::min(K_AT_ONCE, c.K - k);
      const bf16* pairs[2];
      for (int64_t h = 0; h < 2; ++h) {
        const uint8_t* panel = c.w + std::min(p + h, end - 1) * bytes;  // the last one twice if they are odd
        bf16* half = unpacked.data() + h * K_AT_ONCE * LANES;
        pairs[h] = KIND == BF16 ? reinterpret_cast<const bf16*>(panel) + LANES * k : half;
        if (KIND == INT8) int8_unpack(panel + LANES * k, n, half);
        if (KIND == INT4) int4_unpack(panel + panel_bytes(INT4, k, c.G), n, c.G, half);
      }
      UP_TO_8_ROWS(pairs_rows, c, c.x + m * c.K + k, pairs, n, out.data() + m * LANES)
    }
    for (int64_t h = 0; h < std::min<int64_t>(2, end - p); ++h) {
      float* half = out.data() + h * c.M * LANES;
      if (KIND == INT8) {
        const __m512 scales = _mm512_loadu_ps(c.w + (p + h) * bytes + LANES * c.K);
        for (int64_t m = 0; m < c.M; ++m)
          _mm512_storeu_ps(half + m * LANES, _mm512_mul_ps(_mm512_loadu_ps(half + m * LANES), scales));
      }
      store(c, p + h, half);
    }
  }
}
