/* AVX2 with VNNI: PCs without AVX-512 since 2021 (Intel's 12th generation). 32 products of bytes per
 * instruction, for which AVX2 alone takes two (4 bits) or four (8 bits). */
#include "native.h"

#if defined(__x86_64__) && !defined(OLD_ASSEMBLER) && \
    ((defined(__clang__) && __clang_major__ >= 13) || (!defined(__clang__) && __GNUC__ >= 11))
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif
#include <cpuid.h>
#include <immintrin.h>

#include "isa_256.h"

INLINE_ISA vi add_products(vi sums, __m256i weights, __m256i x) {
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)sums, weights, x);
}

INLINE_ISA void dot_q4(const int num, const uint8_t *w, const int8_t *q, vi *dots) {
    const __m256i mask = _mm256_set1_epi8(15);
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
        __m256i both = _mm256_loadu_si256((const __m256i *)(w + v * 32));
        __m256i low = _mm256_and_si256(both, mask);
        __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
        for (int r = 0; r < num; r++) dots[r] = add_products(dots[r], low, four(q, 2 * v, r));
        for (int r = 0; r < num; r++) dots[r] = add_products(dots[r], high, four(q, 2 * v + 1, r));
    }
}

/* Weights lie 128 too high: one operand is unsigned. */
INLINE_ISA void dot_q8(const int num, const uint8_t *w, const int8_t *q, vi *dots) {
#pragma GCC unroll 8
    for (int v = 0; v < 8; v++) {
        __m256i weights = _mm256_loadu_si256((const __m256i *)(w + v * 32));
        for (int r = 0; r < num; r++) dots[r] = add_products(dots[r], weights, four(q, v, r));
    }
}

#include "kernels.inc.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

/* NULL if this CPU has AVX2 alone. Compilers know this set by name later than its instructions. */
const isa *find_avxvnni(void) {
    static const isa found = {"avxvnni", LANES, 0x80, quantize, to_q8_0, narrow, linear, rms_norm,
                              rotate, gate, attend, merge, argmax, draw, rate};
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1 ? &found : NULL;
}
#else
const isa *find_avxvnni(void) { return NULL; }
#endif
