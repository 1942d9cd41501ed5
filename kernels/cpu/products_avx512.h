// The products with AVX-512 and its bf16 dot product; included by products.cpp, which explains the layouts.

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx512vbmi,avx2,fma")))
#define INLINE_AVX512 AVX512 __attribute__((always_inline)) inline

INLINE_AVX512 __m512bh pairs_at(const void* x) { return (__m512bh)_mm512_loadu_si512(x); }
INLINE_AVX512 __m512bh pair_everywhere(const bf16* x) {  // two neighbours of x, broadcast to every lane
  int32_t both;
  std::memcpy(&both, x, 4);
  return (__m512bh)_mm512_set1_epi32(both);
}

// Prefetches weights. Where there is much to do per cache line, the hardware does not prefetch far enough ahead.
INLINE_AVX512 void fetch(const void* weights) { _mm_prefetch((const char*)weights + 4096, _MM_HINT_NTA); }

template <int M>
AVX512 void bf16_rows(const Call& c, const bf16* x, const Group*, const uint8_t* panel, float* out) {
  constexpr int CHAINS = M > 2 ? 1 : 4 / M;  // enough independent sums to hide the latency of one
  __m512 sums[CHAINS][M];
  for (auto& chain : sums)
    for (auto& sum : chain) sum = _mm512_setzero_ps();
  const int64_t pairs = c.K / 2;
  const auto add = [&](int64_t i, __m512* to) AVX512 {
    const __m512bh w = pairs_at(panel + 64 * i);
    for (int m = 0; m < M; ++m) to[m] = _mm512_dpbf16_ps(to[m], w, pair_everywhere(x + 2 * (i * M + m)));
  };
  int64_t i = 0;
  for (; i + CHAINS <= pairs; i += CHAINS)
    for (int a = 0; a < CHAINS; ++a) {
      if (M > 1) fetch(panel + 64 * (i + a));
      add(i + a, sums[a]);
    }
  for (; i < pairs; ++i) add(i, sums[0]);
  for (int m = 0; m < M; ++m) {
    for (int a = 1; a < CHAINS; ++a) sums[0][m] = _mm512_add_ps(sums[0][m], sums[a][m]);
    _mm512_storeu_ps(out + m * LANES, sums[0][m]);
  }
}

// Quantises a row of x, each input to 256 * high + low, both signed, as vpdpbusd multiplies unsigned by signed bytes.
AVX512 void round_avx512(const bf16* x, int64_t K, int64_t G, int64_t rows, Group* groups, int8_t* out) {
  const auto inputs = [&](int64_t i, int64_t end) AVX512 {  // 16 inputs as float, at the end fewer
    const __mmask16 lanes = end - i >= LANES ? 0xFFFF : (1 << (end - i)) - 1;
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, x + i)), 16));
  };
  for (int64_t first = 0; first < K; first += INPUTS_PER_SCALE) {
    const int64_t last = std::min(K, first + INPUTS_PER_SCALE);
    __m512i greatest = _mm512_setzero_si512();  // compared as bits: NaN is above every number, so it is kept
    for (int64_t i = first; i < last; i += LANES)
      greatest = _mm512_max_epi32(greatest, _mm512_castps_si512(_mm512_abs_ps(inputs(i, last))));
    const float top = std::max(std::bit_cast<float>(_mm512_reduce_max_epi32(greatest)), 1e-30f);
    for (int64_t g = first; g < last; g += G, ++groups) {
      const int64_t end = std::min(last, g + G);
      __m512i total = _mm512_setzero_si512();
      for (int64_t i = g; i < end; i += LANES) {
        const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(inputs(i, end), _mm512_set1_ps(MAX_QUANTIZED_INPUT / top)));
        total = _mm512_add_epi32(total, q);
        const __m128i low = _mm512_cvtepi32_epi8(q);
        const __m128i high = _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_sub_epi32(q, _mm512_cvtepi8_epi32(low)), 8));
        alignas(16) int64_t fours[4];
        _mm_store_si128((__m128i*)fours, _mm_unpacklo_epi32(high, low));
        _mm_store_si128((__m128i*)fours + 1, _mm_unpackhi_epi32(high, low));
        for (int64_t t = 0; t < std::min<int64_t>(4, (end - i) / 4); ++t) std::memcpy(out + 8 * rows * (i / 4 + t), fours + t, 8);
      }
      *groups = {float(_mm512_reduce_add_epi32(total)), top / MAX_QUANTIZED_INPUT};
    }
  }
}

// Adds the products of 64 weight bytes (16 outputs, 4 inputs) with a row's inputs to its sums for high and low bytes.
template <int M>
INLINE_AVX512 void add_bytes(__m512i weights, const int8_t* x, __m512i (&sums)[2][M]) {
  for (int m = 0; m < M; ++m)
    for (int part = 0; part < 2; ++part) {
      int32_t four;
      std::memcpy(&four, x + 8 * m + 4 * part, 4);
      sums[part][m] = _mm512_dpbusd_epi32(sums[part][m], weights, _mm512_set1_epi32(four));
    }
}

INLINE_AVX512 __m512 whole(__m512i high, __m512i low) {
  return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
}

template <int M>
AVX512 void int8_rows(const Call& c, const bf16* inputs, const Group* groups, const uint8_t* panel, float* out) {
  const int8_t* x = reinterpret_cast<const int8_t*>(inputs);
  const int64_t n = n_groups(c.K, c.G);
  __m512 totals[M] = {};
  for (int64_t g = 0; g < n; ++g) {
    __m512i sums[2][M] = {};
    for (int64_t i = g * c.G; i < std::min(c.K, (g + 1) * c.G); i += 4, x += 8 * M, panel += 64) {
      if (M > 1) fetch(panel);
      add_bytes<M>(_mm512_loadu_si512(panel), x, sums);
    }
    for (int m = 0; m < M; ++m) {
      const Group& group = groups[m * n + g];
      const __m512 sum = _mm512_sub_ps(whole(sums[0][m], sums[1][m]), _mm512_set1_ps(128 * group.sum));
      totals[m] = _mm512_fmadd_ps(sum, _mm512_set1_ps(group.scale), totals[m]);
    }
  }
  const __m512 scales = _mm512_loadu_ps(panel);
  for (int m = 0; m < M; ++m) _mm512_storeu_ps(out + m * LANES, _mm512_mul_ps(totals[m], scales));
}

// Scales and lowest weights of a group of 16 outputs.
template <int BITS, typename P>
INLINE_AVX512 std::pair<__m512, __m512> ends_at(Width<BITS> width, const uint8_t* panel, P pairs) {
  const __m512i words = _mm512_loadu_si512(panel);
  __m512 scales = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  __m512 zeros = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int32_t(0xFFFF0000))));
  if (pairs.is_half) {
    scales = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words));
    zeros = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16)));
  }
  return {scales, lowest_weight(width, scales, zeros, pairs.zeros)};
}

template <int M, int BITS, typename P>
AVX512 void group_rows(Width<BITS> width, P form, const Call& c, const bf16* inputs, const Group* groups, const uint8_t* panel, float* out) {
  const int8_t* x = reinterpret_cast<const int8_t*>(inputs);
  const __m512i four_bits = _mm512_set1_epi8(0xF);
  const int64_t n = c.K / c.G;
  __m512 totals[M] = {};
  for (int64_t g = 0; g < n;) {
    const Group* first = groups + g;
    __m512 scaled[M] = {};  // sums of the groups whose inputs share this scale
    for (const int64_t end = std::min(n, g + INPUTS_PER_SCALE / c.G); g < end; ++g) {
      __m512i sums[2][M] = {};
      for (int64_t i = 0; i < c.G; i += width.IN_A_WORD, x += 2 * width.IN_A_WORD * M, panel += 64) {
        if (M > 1 || BITS == 4) fetch(panel);
        const __m512i bytes = _mm512_loadu_si512(panel);
        add_bytes<M>(BITS == 4 ? _mm512_and_si512(bytes, four_bits) : bytes, x, sums);
        if (BITS == 4) add_bytes<M>(_mm512_and_si512(_mm512_srli_epi32(bytes, 4), four_bits), x + 8 * M, sums);
      }
      const auto [scales, lowest] = ends_at(width, panel, form);
      panel += 64;
      for (int m = 0; m < M; ++m) {
        scaled[m] = _mm512_fmadd_ps(whole(sums[0][m], sums[1][m]), scales, scaled[m]);
        scaled[m] = _mm512_fmadd_ps(lowest, _mm512_set1_ps(groups[m * n + g].sum), scaled[m]);
      }
    }
    for (int m = 0; m < M; ++m)
      totals[m] = _mm512_fmadd_ps(scaled[m], _mm512_set1_ps(first[m * n].scale), totals[m]);
  }
  for (int m = 0; m < M; ++m) _mm512_storeu_ps(out + m * LANES, totals[m]);
}

// Makes bf16 of fp8, whose 128 sizes it looks up, a byte at a time. (Shifting makes subnormal numbers of fp8 subnormal
// ones of bf16, which vdpbf16ps takes for 0.)
constexpr auto FP8_SIZES = [] {
  std::array<std::array<uint8_t, 128>, 2> bytes{};  // the lower ones, the upper ones
  for (int i = 0; i < 256; ++i) bytes[i / 128][i % 128] = std::bit_cast<uint32_t>(FP8_VALUES[i % 128]) >> (16 + 8 * (i / 128));
  return bytes;
}();

struct Fp8 {
  __m512i sizes[2][2];

  INLINE_AVX512 Fp8() {
    for (int i = 0; i < 4; ++i) sizes[i / 2][i % 2] = _mm512_loadu_si512(FP8_SIZES[i / 2].data() + 64 * (i % 2));
  }
  // A row's first and second two of four inputs in each word.
  INLINE_AVX512 std::pair<__m512i, __m512i> pairs(__m512i bytes) const {
    const __m512i upper_byte = _mm512_set1_epi16(int16_t(0xFF00)), sign = _mm512_set1_epi8(int8_t(0x80));
    const __m512i lower = _mm512_permutex2var_epi8(sizes[0][0], bytes, sizes[0][1]);
    const __m512i upper = _mm512_or_si512(_mm512_permutex2var_epi8(sizes[1][0], bytes, sizes[1][1]), _mm512_and_si512(bytes, sign));
    return {_mm512_or_si512(_mm512_slli_epi16(upper, 8), _mm512_andnot_si512(upper_byte, lower)),
            _mm512_or_si512(_mm512_and_si512(upper, upper_byte), _mm512_srli_epi16(lower, 8))};
  }
};

template <int M>
AVX512 void fp8_rows(const Call& c, const bf16* x, const Group*, const uint8_t* panel, float* out) {
  const Fp8 fp8;
  __m512 totals[M] = {};
  for (int64_t k = 0; k < c.K; k += c.G, panel += 64) {
    __m512 sums[2][M] = {};
    for (int64_t i = 0; i < c.G; i += 4, x += 4 * M, panel += 64) {
      fetch(panel);
      const auto [first, second] = fp8.pairs(_mm512_loadu_si512(panel));
      for (int m = 0; m < M; ++m) {
        sums[0][m] = _mm512_dpbf16_ps(sums[0][m], (__m512bh)first, pair_everywhere(x + 2 * m));
        sums[1][m] = _mm512_dpbf16_ps(sums[1][m], (__m512bh)second, pair_everywhere(x + 2 * (M + m)));
      }
    }
    const __m512 scales = _mm512_loadu_ps(panel);
    for (int m = 0; m < M; ++m) totals[m] = _mm512_fmadd_ps(_mm512_add_ps(sums[0][m], sums[1][m]), scales, totals[m]);
  }
  for (int m = 0; m < M; ++m) _mm512_storeu_ps(out + m * LANES, totals[m]);
}

// For many rows of x, K_AT_ONCE inputs of two panels at a time are unpacked to bf16 pairs, which then stay in the L1
// cache for all rows.
constexpr int64_t K_AT_ONCE = 256;  // a multiple of every group size

// A signed byte is exact in bf16, so the upper half of its float is that bf16.
INLINE_AVX512 void int8_unpack(const uint8_t* panel, int64_t n, bf16* pairs) {
  const auto float_of = [&](__m512i words, int first) AVX512 {
    const __m512i byte = _mm512_and_si512(_mm512_srli_epi32(words, first), _mm512_set1_epi32(0xFF));
    return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_sub_epi32(byte, _mm512_set1_epi32(128))));
  };
  for (int64_t i = 0; i < n / 4; ++i) {
    const __m512i words = _mm512_loadu_si512(panel + 64 * i);
    for (int j = 0; j < 2; ++j, pairs += 32) {
      const __m512i even = _mm512_srli_epi32(float_of(words, 16 * j), 16);
      _mm512_storeu_si512(pairs, _mm512_or_si512(even, float_of(words, 16 * j + 8)));
    }
  }
}

INLINE_AVX512 void store_pairs(__m512 even, __m512 odd, bf16* pairs) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
  _mm512_storeu_si512(pairs, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

template <int BITS>
INLINE_AVX512 void group_unpack(const Call& c, const uint8_t* panel, int64_t n, bf16* pairs) {
  constexpr Width<BITS> width;
  const __m512i mask = _mm512_set1_epi32(width.MASK);
  const int64_t bytes = LANES * c.G * BITS / 8;
  for (int64_t g = 0; g < n / c.G; ++g, panel += bytes + LANES * 4) {
    const auto [scales, lowest] = ends_at(width, panel + bytes, c.pairs);
    for (int64_t i = 0; i < c.G / width.IN_A_WORD; ++i) {
      const __m512i words = _mm512_loadu_si512(panel + 64 * i);
      for (int j = 0; j < width.IN_A_WORD / 2; ++j, pairs += 32) {
        const int first = 16 * (j % 2) + 4 * (j / 2);
        const __m512i even = _mm512_and_si512(_mm512_srli_epi32(words, first), mask);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(words, first + 8), mask);
        store_pairs(_mm512_fmadd_ps(_mm512_cvtepi32_ps(even), scales, lowest),
                    _mm512_fmadd_ps(_mm512_cvtepi32_ps(odd), scales, lowest), pairs);
      }
    }
  }
}

INLINE_AVX512 void fp8_unpack(const Call& c, const uint8_t* panel, int64_t n, bf16* pairs) {
  const Fp8 fp8;
  const __m512i odd = _mm512_set1_epi32(int32_t(0xFFFF0000));
  for (int64_t k = 0; k < n; k += c.G, panel += 64) {
    const __m512 scales = _mm512_loadu_ps(panel + LANES * c.G);
    for (int64_t i = 0; i < c.G; i += 4, panel += 64) {
      const auto [first, second] = fp8.pairs(_mm512_loadu_si512(panel));
      for (const __m512i two : {first, second}) {
        store_pairs(_mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(two, 16)), scales),
                    _mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(two, odd)), scales), pairs);
        pairs += 32;
      }
    }
  }
}

// Adds `x [M, c.K]` times two panels' pairs, for n inputs, to out `[M, 16]`; the second panel's is c.M rows further on.
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
AVX512 void fp8_avx512(const Call& c, const uint8_t* panel, float* out) { UP_TO_8_ROWS(fp8_rows, FEW_ROWS) }
template <int BITS>
AVX512 void groups_avx512(const Call& c, const uint8_t* panel, float* out) {
  if (c.pairs.is_half || c.pairs.zeros != MIDDLE) UP_TO_8_ROWS(group_rows, Width<BITS>(), c.pairs, FEW_ROWS)
  else UP_TO_8_ROWS(group_rows, Width<BITS>(), Ours(), FEW_ROWS)
}

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
        const uint8_t* panel = c.w + std::min(p + h, end - 1) * bytes;  // the last one twice if the number is odd
        bf16* half = unpacked.data() + h * K_AT_ONCE * LANES;
        pairs[h] = KIND == BF16 ? reinterpret_cast<const bf16*>(panel) + LANES * k : half;
        if (KIND == INT8) int8_unpack(panel + LANES * k, n, half);
        if (KIND == GROUPS4) group_unpack<4>(c, panel + panel_bytes(KIND, k, c.G), n, half);
        if (KIND == GROUPS8) group_unpack<8>(c, panel + panel_bytes(KIND, k, c.G), n, half);
        if (KIND == FP8) fp8_unpack(c, panel + panel_bytes(KIND, k, c.G), n, half);
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
