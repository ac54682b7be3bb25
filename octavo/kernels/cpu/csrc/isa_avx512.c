/* AVX-512 with VNNI: 64 products of bytes per instruction. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
#endif
#include <immintrin.h>

#include "native.h"

#define LANES 16
#define MR 8
#define SUMS 24
#include "lanes.h"

INLINE_ISA vf vfma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }

INLINE_ISA vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE_ISA vf vmin(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE_ISA float sum_lanes(vf x) { return _mm512_reduce_add_ps((__m512)x); }
INLINE_ISA float max_lanes(vf x) { return _mm512_reduce_max_ps((__m512)x); }

INLINE_ISA vf load_half(const uint8_t *p) {
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

INLINE_ISA void store_half(uint8_t *p, vf x) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}

INLINE_ISA void narrow_group(const vi *x, int8_t *to) {
    for (int v = 0; v < 2; v++)
        _mm_storeu_si128((__m128i *)to + v, _mm512_cvtepi32_epi8((__m512i)x[v]));
}

INLINE_ISA __m512i four(const int8_t *q, int v, int r) {
    int32_t bytes;
    __builtin_memcpy(&bytes, FOUR(q, v, r), 4);
    return _mm512_set1_epi32(bytes);
}

/* 8-bit weights lie 128 too high: one operand is unsigned. */
INLINE_ISA void dot(const int kind, const int num, const vb *w, const int8_t *q, vi *dots) {
    (void)kind;
#pragma GCC unroll 8
    for (int v = 0; v < FOURS; v++)
        for (int r = 0; r < num; r++)
            dots[r] = (vi)_mm512_dpbusd_epi32((__m512i)dots[r], (__m512i)w[v], four(q, v, r));
}

#include "kernels.inc.h"

const isa isa_avx512 = {"avx512", LANES, 0x80, quantize, to_q8_0, narrow, linear, rms_norm, rotate,
                        gate, attend, merge, argmax, draw, rate};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
