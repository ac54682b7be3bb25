/* Four lanes in plain C: what the generic and NEON versions share. */
#define LANES 4
#define MR 4
#define SUMS 12
#include "lanes.h"

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
