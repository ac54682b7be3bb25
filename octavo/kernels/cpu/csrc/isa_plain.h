/* Four lanes in plain C: what the generic and NEON versions share. */
#define LANES 4
#define MR 4
#define SUMS 12
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef float vfu __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t viu __attribute__((vector_size(16), aligned(4), may_alias));

#define INLINE_ISA static inline __attribute__((always_inline))

INLINE_ISA vf vmax(vf a, vf b) { return (vf)(((vi)a & (a > b)) | ((vi)b & ~(a > b))); }
INLINE_ISA vf vmin(vf a, vf b) { return (vf)(((vi)a & (a < b)) | ((vi)b & ~(a < b))); }
INLINE_ISA float sum_lanes(vf x) { return (x[0] + x[2]) + (x[1] + x[3]); }

INLINE_ISA float max_lanes(vf x) {
    float low = x[0] > x[2] ? x[0] : x[2], high = x[1] > x[3] ? x[1] : x[3];
    return low > high ? low : high;
}

INLINE_ISA void narrow_group(const vi *x, int8_t *to) {
    for (int i = 0; i < GROUP; i++) to[i] = (int8_t)x[i / LANES][i % LANES];
}
