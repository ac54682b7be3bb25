/* AArch64 with the dot-product instructions (ARMv8.2: Graviton 2, Apple M1, Cortex-A76 and later). */
#if defined(__aarch64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#include <arm_neon.h>

#include "native.h"

#include "isa_plain.h"

INLINE_ISA vf vfma(vf a, vf b, vf c) {
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}

INLINE_ISA vf load_half(const uint8_t *p) {
    return (vf)vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
}

INLINE_ISA void store_half(uint8_t *p, vf x) {
    vst1_u8(p, vreinterpret_u8_f16(vcvt_f16_f32((float32x4_t)x)));
}

INLINE_ISA int8x16_t four(const int8_t *q, int v, int r) {
    int32_t bytes;
    __builtin_memcpy(&bytes, FOUR(q, v, r), 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(bytes));
}

INLINE_ISA void dot(const int kind, const int num, const vb *w, const int8_t *q, vi *dots) {
    (void)kind;
    for (int v = 0; v < FOURS; v++)
        for (int r = 0; r < num; r++)
            dots[r] = (vi)vdotq_s32((int32x4_t)dots[r], (int8x16_t)w[v], four(q, v, r));
}

#include "kernels.inc.h"

const isa isa_neon = {"neon", LANES, 0, quantize, to_q8_0, narrow, linear, rms_norm, rotate,
                      gate, attend, merge, argmax, draw, rate};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
