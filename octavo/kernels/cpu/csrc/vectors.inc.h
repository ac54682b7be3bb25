/* Vectors of LANES floats: what the kernels are written in. */
#include <math.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef uint16_t vh __attribute__((vector_size(2 * LANES)));

INLINE vf splat(float x) {
    return x - (vf){};
}
INLINE vf load(const float *p) { return *(const vfu *)p; }
INLINE void store(float *p, vf x) { *(vfu *)p = x; }
INLINE vf vabs(vf a) { return (vf)((vi)a & 0x7fffffff); }
INLINE vf to_float(vi a) { return __builtin_convertvector(a, vf); }

/* To the nearest integer, for |x| < 2^22. */
#define ROUNDING 12582912.0f
INLINE vi round_to_int(vf x) { return (vi)(x + splat(ROUNDING)) - (vi)splat(ROUNDING); }

/* e^x / 2^n to 2 ulp, where n is the integer nearest to x / ln 2. */
INLINE vf vexp_mantissa(vf x, vf *n) {
    *n = x * splat(1.44269504f) + splat(ROUNDING) - splat(ROUNDING);
    vf r = vfma(*n, splat(-0.693359375f), x);
    r = vfma(*n, splat(2.12194440e-4f), r);
    vf p = splat(1.9875691500e-4f);
    p = vfma(p, r, splat(1.3981999507e-3f));
    p = vfma(p, r, splat(8.3334519073e-3f));
    p = vfma(p, r, splat(4.1665795894e-2f));
    p = vfma(p, r, splat(1.6666665459e-1f));
    p = vfma(p, r, splat(5.0000001201e-1f));
    return vfma(p * r, r, r + splat(1.0f));
}

/* e^x; 0 below -87.3, e^88.7 above. */
INLINE vf vexp(vf x) {
    vi zero = x < splat(-87.3f);
    vf n, p = vexp_mantissa(vmin(vmax(x, splat(-87.3f)), splat(88.7f)), &n);
    /* In two steps: 2^128 alone would overflow. */
    vi half = __builtin_convertvector(n, vi) >> 1, rest = __builtin_convertvector(n, vi) - half;
    p = p * (vf)((half + 127) << 23) * (vf)((rest + 127) << 23);
    return (vf)((vi)p & ~zero);
}

/* The same for x <= 0. */
INLINE vf vexp_down(vf x) {
    vi some = x >= splat(-87.3f);
    vf n, p = vexp_mantissa(vmax(x, splat(-87.3f)), &n);
    return (vf)((vi)(p * (vf)((__builtin_convertvector(n, vi) + 127) << 23)) & some);
}

INLINE vf vtanh(vf x) {
    vf e = vexp(vabs(x) * splat(-2.0f));
    vf t = (splat(1.0f) - e) / (splat(1.0f) + e);
    return (vf)((vi)t | ((vi)x & (vi)splat(-0.0f)));
}

/* LANES numbers of any type. */
INLINE vf load_number(const int type, const uint8_t *p) {
    if (type == FLOAT16) return load_half(p);
    if (type == FLOAT32) return load((const float *)p);
    vh upper;
    memcpy(&upper, p, sizeof upper);
    return (vf)(__builtin_convertvector(upper, vi) << 16);
}

/* To the nearest, ties to even. What float16 has no room for becomes its largest number. */
INLINE void store_number(const int type, uint8_t *p, vf x) {
    if (type == FLOAT32) {
        store((float *)p, x);
    } else if (type == FLOAT16) {
        vf held = vmax(vmin(x, splat(65504)), splat(-65504));
        vi is_number = x == x;
        store_half(p, (vf)(((vi)held & is_number) | ((vi)x & ~is_number)));
    } else {
        vu bits = (vu)x;
        vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, nan = bits >> 16 | 0x40;
        vu is_number = (vu)(x == x);
        vh upper = __builtin_convertvector((rounded & is_number) | (nan & ~is_number), vh);
        memcpy(p, &upper, sizeof upper);
    }
}
