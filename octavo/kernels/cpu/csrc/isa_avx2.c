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

/* For a, then b, in each half of 128 bits. */
INLINE_ISA vf add_neighbours(vf a, vf b) { return (vf)_mm256_hadd_ps((__m256)a, (__m256)b); }
#define add_neighbours add_neighbours

/* Of 4 bits, a group's sum fits 16 bits: sixteen products of at most 15 * 127 add up to 30,480. Of 8
 * bits, two products do: weights lie 128 too high, one operand being unsigned, and activations were
 * divided such that two neighbours of the same sign add up to 128 at most, which is taken 255 times
 * (129 where both were rounded up: what saturates is less than that rounding). */
INLINE_ISA void dot(const int kind, const int num, const vb *w, const int8_t *q, vi *dots) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sums[MR];
#pragma GCC unroll 8
    for (int v = 0; v < FOURS; v++)
        for (int r = 0; r < num; r++) {
            __m256i pairs = _mm256_maddubs_epi16((__m256i)w[v], four(q, v, r));
            /* Keeps the compiler from adding up in a tree, for which there are no registers. */
            if (kind == Q8_0) {
                dots[r] += (vi)_mm256_madd_epi16(pairs, ones);
                __asm__("" : "+x"(dots[r]));
            } else {
                sums[r] = v ? _mm256_add_epi16(sums[r], pairs) : pairs;
                __asm__("" : "+x"(sums[r]));
            }
        }
    if (kind != Q8_0)
        for (int r = 0; r < num; r++) dots[r] += (vi)_mm256_madd_epi16(sums[r], ones);
}

#include "kernels.inc.h"

const isa isa_avx2 = {"avx2", LANES, 0x80, quantize, to_q8_0, narrow, linear, rms_norm, rotate,
                      gate, attend, merge, argmax, draw, rate};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
