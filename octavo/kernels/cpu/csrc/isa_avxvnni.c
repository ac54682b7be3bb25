/* AVX2 with VNNI: PCs without AVX-512 since 2021 (Intel's 12th generation). 32 products of bytes per
 * instruction, for which AVX2 alone takes two (4 bits) or three (8 bits). */
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

/* 8-bit weights lie 128 too high: one operand is unsigned. */
INLINE_ISA void dot(const int kind, const int num, const vb *w, const int8_t *q, vi *dots) {
    (void)kind;
#pragma GCC unroll 8
    for (int v = 0; v < FOURS; v++)
        for (int r = 0; r < num; r++)
            dots[r] = (vi)_mm256_dpbusd_avx_epi32((__m256i)dots[r], (__m256i)w[v], four(q, v, r));
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
