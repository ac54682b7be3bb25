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

INLINE_ISA void dot_q4(const int num, const uint8_t *w, const int8_t *q, vi *dots) {
    for (int v = 0; v < 4; v++) {
        uint8x16_t both = vld1q_u8(w + v * 16);
        int8x16_t low = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
        int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
        for (int r = 0; r < num; r++) {
            int32x4_t sum = vdotq_s32((int32x4_t)dots[r], low, four(q, 2 * v, r));
            dots[r] = (vi)vdotq_s32(sum, high, four(q, 2 * v + 1, r));
        }
    }
}

INLINE_ISA void dot_q8(const int num, const uint8_t *w, const int8_t *q, vi *dots) {
    for (int v = 0; v < 8; v++) {
        int8x16_t weights = vreinterpretq_s8_u8(vld1q_u8(w + v * 16));
        for (int r = 0; r < num; r++)
            dots[r] = (vi)vdotq_s32((int32x4_t)dots[r], weights, four(q, v, r));
    }
}

#include "kernels.inc.h"

const isa isa_neon = {"neon", LANES, 0, quantize, to_q8_0, narrow, linear, rms_norm, rotate,
                      gate, attend, merge, argmax, draw, rate};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
