/* Eight lanes in AVX2, FMA and F16C: what products of bytes have no part in. */
#define LANES 8
#define MR 8 /* all registers hold products; results of the groups before wait in memory */
#define SUMS 12
#include "lanes.h"

INLINE_ISA vf vfma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }

INLINE_ISA vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE_ISA vf vmin(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }

INLINE_ISA float sum_lanes(vf x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

INLINE_ISA float max_lanes(vf x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

INLINE_ISA vf load_half(const uint8_t *p) {
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}

INLINE_ISA void store_half(uint8_t *p, vf x) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}

INLINE_ISA void narrow_group(const vi *x, int8_t *to) {
    __m256i low = _mm256_packs_epi32((__m256i)x[0], (__m256i)x[1]);
    __m256i high = _mm256_packs_epi32((__m256i)x[2], (__m256i)x[3]);
    /* Both packed within their 128-bit halves: fours lie in the order 0, 2, 4, 6, 1, 3, 5, 7. */
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    _mm256_storeu_si256((__m256i *)to, bytes);
}

INLINE_ISA __m256i four(const int8_t *q, int v, int r) {
    int32_t bytes;
    __builtin_memcpy(&bytes, FOUR(q, v, r), 4);
    return _mm256_set1_epi32(bytes);
}
