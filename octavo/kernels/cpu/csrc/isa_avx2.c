/* AVX2 with FMA and F16C: every x86 server and PC since 2013 (Intel) or 2015 (AMD). */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>

#include "native.h"

#define LANES 8
#define MR 4
#define SUMS 12
typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));
typedef float vfu __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t viu __attribute__((vector_size(32), aligned(4), may_alias));

#define INLINE_ISA static inline __attribute__((always_inline))

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

/* Sixteen products of at most 15 * 127 add up to 30,480: a group's sum fits 16 bits. */
INLINE_ISA void dot_q4(const int num, const uint8_t *w, const int8_t *q, vi *dots) {
    const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256i sums[MR];
    for (int r = 0; r < num; r++) sums[r] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
        __m256i both = _mm256_loadu_si256((const __m256i *)(w + v * 32));
        __m256i low = _mm256_and_si256(both, mask);
        __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
        for (int r = 0; r < num; r++) {
            sums[r] = _mm256_add_epi16(sums[r], _mm256_maddubs_epi16(low, four(q, 2 * v, r)));
            sums[r] = _mm256_add_epi16(sums[r], _mm256_maddubs_epi16(high, four(q, 2 * v + 1, r)));
            /* Keeps the compiler from adding up in a tree, for which there are no registers. */
            __asm__("" : "+x"(sums[r]));
        }
    }
    for (int r = 0; r < num; r++) dots[r] += (vi)_mm256_madd_epi16(sums[r], ones);
}

/* |w| * (a with w's sign): two products of at most 128 * 127 fit 16 bits. */
INLINE_ISA void dot_q8(const int num, const uint8_t *w, const int8_t *q, vi *dots) {
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 8
    for (int v = 0; v < 8; v++) {
        __m256i weights = _mm256_loadu_si256((const __m256i *)(w + v * 32));
        __m256i magnitudes = _mm256_abs_epi8(weights);
        for (int r = 0; r < num; r++) {
            __m256i signs = _mm256_sign_epi8(four(q, v, r), weights);
            __m256i pairs = _mm256_maddubs_epi16(magnitudes, signs);
            dots[r] += (vi)_mm256_madd_epi16(pairs, ones);
            __asm__("" : "+x"(dots[r])); /* as above */
        }
    }
}

#include "kernels.inc.h"

const isa isa_avx2 = {"avx2", LANES, 0, quantize, to_q8_0, narrow, linear, rms_norm, rotate,
                      gate, attend, merge, argmax, draw, rate};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
