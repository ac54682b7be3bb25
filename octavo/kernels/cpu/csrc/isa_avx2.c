/* AVX2 with FMA and F16C: every x86 server and PC since 2013 (Intel) or 2015 (AMD). */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>

#include "native.h"

#include "isa_256.h"

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

/* For a, then b, in each half of 128 bits. */
INLINE_ISA vf add_neighbours(vf a, vf b) { return (vf)_mm256_hadd_ps((__m256)a, (__m256)b); }
#define add_neighbours add_neighbours

/* Weights lie 128 too high: one operand is unsigned. Two products fit 16 bits because activations
 * were divided such that two neighbours of the same sign add up to 128 at most, times 255. */
INLINE_ISA void dot_q8(const int num, const uint8_t *w, const int8_t *q, vi *dots) {
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 8
    for (int v = 0; v < 8; v++) {
        __m256i weights = _mm256_loadu_si256((const __m256i *)(w + v * 32));
        for (int r = 0; r < num; r++) {
            __m256i pairs = _mm256_maddubs_epi16(weights, four(q, v, r));
            dots[r] += (vi)_mm256_madd_epi16(pairs, ones);
            __asm__("" : "+x"(dots[r])); /* as above */
        }
    }
}

#include "kernels.inc.h"

const isa isa_avx2 = {"avx2", LANES, 0x80, quantize, to_q8_0, narrow, linear, rms_norm, rotate,
                      gate, attend, merge, argmax, draw, rate};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
