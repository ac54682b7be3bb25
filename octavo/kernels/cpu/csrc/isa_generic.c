/* Plain C for any CPU: right, not fast. Also what other instruction sets are tested against. */
#include "native.h"

#include "isa_plain.h"

INLINE_ISA vf vfma(vf a, vf b, vf c) { return a * b + c; }

INLINE_ISA vf load_half(const uint8_t *p) {
    vf x;
    for (int i = 0; i < LANES; i++) {
        uint16_t half;
        __builtin_memcpy(&half, p + 2 * i, 2);
        x[i] = half_to_float(half);
    }
    return x;
}

INLINE_ISA void store_half(uint8_t *p, vf x) {
    for (int i = 0; i < LANES; i++) {
        uint16_t half = float_to_half(x[i]);
        __builtin_memcpy(p + 2 * i, &half, 2);
    }
}

INLINE_ISA void dot(const int kind, const int num, const vb *w, const int8_t *q, vi *dots) {
    (void)kind;
    for (int v = 0; v < FOURS; v++)
        for (int r = 0; r < num; r++)
            for (int i = 0; i < 4 * LANES; i++)
                dots[r][i / 4] += (int8_t)w[v][i] * FOUR(q, v, r)[i % 4];
}

#include "kernels.inc.h"

const isa isa_generic = {"generic", LANES, 0, quantize, to_q8_0, narrow, linear, rms_norm, rotate,
                         gate, attend, merge, argmax, draw, rate};

/* ---- float16, for code that runs before an instruction set is chosen */

float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
    if (!exponent) {
        float value = (float)mantissa * 5.9604644775390625e-8f; /* 2^-24 */
        return sign ? -value : value;
    }
    uint32_t bits = sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | mantissa << 13;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Rounded to the nearest, ties to even; too large becomes infinity. */
uint16_t float_to_half(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;
    if (bits < 0x38800000) { /* below 2^-14: a multiple of 2^-24 */
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        return sign | (uint16_t)__builtin_rintf(magnitude * 16777216.0f);
    }
    return sign | (uint16_t)((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}
