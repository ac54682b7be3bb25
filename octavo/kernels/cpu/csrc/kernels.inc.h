/* The kernels, written once for vectors of LANES floats. An instruction set defines, before it
 * includes this:
 *   LANES, MR (rows multiplied together), RB (rows of scores held in registers)
 *   vf, vi           vectors of LANES floats and int32s; vfu, viu the same, unaligned
 *   vfma(a, b, c)    a * b + c, rounded once
 *   load_half(p)     LANES float16s as floats
 *   dot_q4, dot_q8   see multiply_group
 *   transpose(x)     LANES vectors in place */
#include <math.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

INLINE vf splat(float x) {
    return x - (vf){};
}
INLINE vf load(const float *p) { return *(const vfu *)p; }
INLINE void store(float *p, vf x) { *(vfu *)p = x; }
INLINE vf vmax(vf a, vf b) { return (vf)(((vi)a & (a > b)) | ((vi)b & ~(a > b))); }
INLINE vf vmin(vf a, vf b) { return (vf)(((vi)a & (a < b)) | ((vi)b & ~(a < b))); }
INLINE vf vabs(vf a) { return (vf)((vi)a & 0x7fffffff); }
INLINE vf to_float(vi a) { return __builtin_convertvector(a, vf); }

INLINE float sum_lanes(vf x) {
    float lanes[LANES];
    store(lanes, x);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}

INLINE float max_lanes(vf x) {
    float lanes[LANES];
    store(lanes, x);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++)
            lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
    return lanes[0];
}

/* To the nearest integer, for |x| < 2^22. */
#define ROUNDING 12582912.0f
INLINE vi round_to_int(vf x) { return (vi)(x + splat(ROUNDING)) - (vi)splat(ROUNDING); }

/* e^x to 2 ulp; 0 below -87.3, e^88.7 above. */
INLINE vf vexp(vf x) {
    vi zero = x < splat(-87.3f);
    x = vmin(vmax(x, splat(-87.3f)), splat(88.7f));
    vf n = x * splat(1.44269504f) + splat(ROUNDING) - splat(ROUNDING);
    vf r = vfma(n, splat(-0.693359375f), x);
    r = vfma(n, splat(2.12194440e-4f), r);
    vf p = splat(1.9875691500e-4f);
    p = vfma(p, r, splat(1.3981999507e-3f));
    p = vfma(p, r, splat(8.3334519073e-3f));
    p = vfma(p, r, splat(4.1665795894e-2f));
    p = vfma(p, r, splat(1.6666665459e-1f));
    p = vfma(p, r, splat(5.0000001201e-1f));
    p = vfma(p * r, r, r + splat(1.0f));
    /* In two steps: 2^128 alone would overflow. */
    vi half = __builtin_convertvector(n, vi) >> 1, rest = __builtin_convertvector(n, vi) - half;
    p = p * (vf)((half + 127) << 23) * (vf)((rest + 127) << 23);
    return (vf)((vi)p & ~zero);
}

INLINE vf vtanh(vf x) {
    vf e = vexp(vabs(x) * splat(-2.0f));
    vf t = (splat(1.0f) - e) / (splat(1.0f) + e);
    return (vf)((vi)t | ((vi)x & (vi)splat(-0.0f)));
}

/* ---- linear */

#define GROUP_VECTORS (GROUP / LANES)
typedef int8_t vb __attribute__((vector_size(LANES)));

static void quantize(const float *x, int32_t in_features, activations *to, int64_t row) {
    int8_t *q = to->q + row * to->num_groups * GROUP;
    for (int32_t g = 0; g < to->num_groups; g++) {
        float tail[GROUP] = {0};
        const float *from = x + g * GROUP;
        if (in_features - g * GROUP < GROUP) {
            memcpy(tail, from, (size_t)(in_features - g * GROUP) * sizeof(float));
            from = tail;
        }
        vf most = {};
        for (int v = 0; v < GROUP_VECTORS; v++) most = vmax(most, vabs(load(from + v * LANES)));
        float scale = max_lanes(most) / 127.0f;
        float inverse = scale > 0 ? 1.0f / scale : 0.0f;
        vi sums = {};
        for (int v = 0; v < GROUP_VECTORS; v++) {
            /* A value that is no number stays one in the scale; here it must only stay in range. */
            vf scaled = vmax(vmin(load(from + v * LANES) * splat(inverse), splat(127)), splat(-127));
            vi rounded = round_to_int(scaled);
            vb bytes = __builtin_convertvector(rounded, vb);
            memcpy(q + g * GROUP + v * LANES, &bytes, LANES);
            sums += rounded;
        }
        int32_t sum = 0;
        for (int l = 0; l < LANES; l++) sum += sums[l];
        int64_t cell = cell_of(to, row) + g * CELL_ROWS;
        to->scale[cell] = scale;
        to->sum[cell] = sum;
        to->xsum[cell] = scale * (float)sum;
    }
}

/* `num` rows of activations, all of one cell, times one panel: LANES results each. */
INLINE void multiply_panel(const int num, const int kind, const uint8_t *panel, const int8_t *q,
                           const activations *x, int64_t row, vf *result) {
    const int32_t num_groups = x->num_groups;
    const size_t stride = (size_t)num_groups * GROUP;
    const size_t quants = (kind == Q8_0 ? 32 : 16) * LANES;
    const size_t group_size = quants + (kind == Q4_1 ? 4 : 2) * LANES;
    int64_t cell = cell_of(x, row);
    for (int r = 0; r < num; r++) result[r] = (vf){};
    for (int32_t g = 0; g < num_groups;
         g++, panel += group_size, q += GROUP, cell += CELL_ROWS) {
        vi dots[MR];
        for (int r = 0; r < num; r++) dots[r] = (vi){};
        if (kind == Q8_0) {
            dot_q8(num, panel, q, stride, x->sum + cell, dots);
        } else {
            dot_q4(num, panel, q, stride, dots);
            if (kind == Q4_0)
                for (int r = 0; r < num; r++) dots[r] -= 8 * x->sum[cell + r];
        }
        vf scale = load_half(panel + quants);
        for (int r = 0; r < num; r++) {
            vf both = scale * splat(x->scale[cell + r]);
            result[r] = vfma(to_float(dots[r]), both, result[r]);
        }
        if (kind == Q4_1) {
            vf least = load_half(panel + quants + 2 * LANES);
            for (int r = 0; r < num; r++)
                result[r] = vfma(least, splat(x->xsum[cell + r]), result[r]);
        }
    }
}

INLINE void linear_of_kind(const int kind, const matrix *m, const activations *x, int64_t row_begin,
                           int64_t row_end, const float *bias, float *out, int64_t out_stride,
                           int32_t panel_begin, int32_t panel_end) {
    const size_t group_size = (size_t)LANES * (kind == Q8_0 ? 34 : kind == Q4_1 ? 20 : 18);
    for (int32_t p = panel_begin; p < panel_end; p++) {
        const uint8_t *panel = m->packed + (size_t)p * m->num_groups * group_size;
        int32_t column = p * LANES, width = m->out_features - column;
        vf add = {};
        if (bias) {
            float tail[LANES] = {0};
            memcpy(tail, bias + column, (size_t)(width < LANES ? width : LANES) * sizeof(float));
            add = load(tail);
        }
        for (int64_t row = row_begin, num; row < row_end; row += num) {
            const int8_t *q = x->q + row * m->num_groups * GROUP;
            vf result[MR];
            num = row_end - row;
            if (num >= MR) {
                num = MR;
                multiply_panel(MR, kind, panel, q, x, row, result);
#if MR > 4
            } else if (num >= 4) {
                num = 4;
                multiply_panel(4, kind, panel, q, x, row, result);
#endif
            } else if (num >= 2) {
                num = 2;
                multiply_panel(2, kind, panel, q, x, row, result);
            } else {
                multiply_panel(1, kind, panel, q, x, row, result);
            }
            for (int r = 0; r < num; r++) {
                vf value = bias ? result[r] + add : result[r];
                float *to = out + (row + r) * out_stride + column;
                if (width >= LANES)
                    store(to, value);
                else
                    memcpy(to, &value, (size_t)width * sizeof(float));
            }
        }
    }
}

/* Activations that stay in the first-level cache while panels pass by. */
#define NEAR_BYTES 20000

static void linear(const matrix *m, const activations *x, int64_t row_begin, int64_t row_end,
                   const float *bias, float *out, int64_t out_stride, int32_t panel_begin,
                   int32_t panel_end) {
    int64_t cells = NEAR_BYTES / (m->num_groups * GROUP * CELL_ROWS);
    int64_t step = (cells > 1 ? cells : 1) * CELL_ROWS;
#define OF(kind) \
    linear_of_kind(kind, m, x, row, end, bias, out, out_stride, panel_begin, panel_end)
    for (int64_t row = row_begin; row < row_end; row += step) {
        int64_t end = row + step < row_end ? row + step : row_end;
        if (m->kind == Q4_1)
            OF(Q4_1);
        else if (m->kind == Q4_0)
            OF(Q4_0);
        else
            OF(Q8_0);
    }
#undef OF
}

/* ---- rows */

static void rms_norm(const float *x, float *residual, const float *weight, float *out, int64_t size,
                     float eps, int32_t add_one) {
    vf squares = {};
    float tail_squares = 0;
    int64_t whole = size / LANES * LANES;
    const float *from = x;
    if (residual) {
        for (int64_t i = 0; i < whole; i += LANES)
            store(residual + i, load(x + i) + load(residual + i));
        for (int64_t i = whole; i < size; i++) residual[i] += x[i];
        from = residual;
    }
    for (int64_t i = 0; i < whole; i += LANES) squares = vfma(load(from + i), load(from + i), squares);
    for (int64_t i = whole; i < size; i++) tail_squares += from[i] * from[i];
    float factor = 1.0f / sqrtf((sum_lanes(squares) + tail_squares) / (float)size + eps);
    float one = add_one ? 1.0f : 0.0f;
    for (int64_t i = 0; i < whole; i += LANES)
        store(out + i, load(from + i) * splat(factor) * (load(weight + i) + splat(one)));
    for (int64_t i = whole; i < size; i++) out[i] = from[i] * factor * (weight[i] + one);
}

static void rotate(float *x, const float *cos, const float *sin, int64_t rot_dim) {
    int64_t half = rot_dim / 2, i = 0;
    for (; i + LANES <= half; i += LANES) {
        vf a = load(x + i), b = load(x + half + i);
        store(x + i, a * load(cos + i) + b * load(sin + i));
        store(x + half + i, b * load(cos + half + i) + a * load(sin + half + i));
    }
    for (; i < half; i++) {
        float a = x[i], b = x[half + i];
        x[i] = a * cos[i] + b * sin[i];
        x[half + i] = b * cos[half + i] + a * sin[half + i];
    }
}

INLINE vf activate(vf x, int32_t act) {
    if (act == ACT_SILU) return x / (splat(1.0f) + vexp(-x));
    if (act == ACT_GELU_TANH) {
        vf inner = splat(0.79788456f) * vfma(splat(0.044715f) * x * x, x, x);
        return splat(0.5f) * x * (splat(1.0f) + vtanh(inner));
    }
    float lanes[LANES];
    store(lanes, x);
    for (int i = 0; i < LANES; i++) lanes[i] *= 0.5f * (1.0f + erff(lanes[i] * 0.70710678f));
    return load(lanes);
}

static void gate(const float *g, const float *up, float *out, int64_t size, int32_t act) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES)
        store(out + i, activate(load(g + i), act) * load(up + i));
    if (i < size) {
        float a[LANES] = {0}, b[LANES] = {0};
        memcpy(a, g + i, (size_t)(size - i) * sizeof(float));
        memcpy(b, up + i, (size_t)(size - i) * sizeof(float));
        vf value = activate(load(a), act) * load(b);
        memcpy(out + i, &value, (size_t)(size - i) * sizeof(float));
    }
}

/* As torch has it: the first of equals, and of numbers that are none the first. */
static int64_t argmax(const float *x, int64_t size) {
    float best = -INFINITY;
    int64_t at = 0;
    for (int64_t start = 0; start < size; start += 1024) {
        int64_t stop = start + 1024 < size ? start + 1024 : size, i = start;
        vf most = splat(-INFINITY);
        vi none = {};
        for (; i + LANES <= stop; i += LANES) {
            vf v = load(x + i);
            most = vmax(v, most);
            none |= v != v;
        }
        float top = max_lanes(most);
        int32_t odd = 0;
        for (int l = 0; l < LANES; l++) odd |= none[l];
        for (; i < stop; i++) {
            if (x[i] > top) top = x[i];
            odd |= x[i] != x[i];
        }
        if (odd)
            for (i = start; i < stop; i++)
                if (x[i] != x[i]) return i;
        if (top <= best) continue;
        best = top;
        for (at = start; x[at] != top; at++) {
        }
    }
    return at;
}

/* ---- attention */

#define KEYS 32 /* keys per step; scores of a row are KEYS / LANES vectors */
#define KEY_VECTORS (KEYS / LANES)
#define PV 4 /* vectors of a head's width that are summed at once */

/* Scores of `num` rows with a step's keys: each a sum over head_dim in order. */
INLINE void score_rows(const int num, const float *const *rows, const float *keys, int32_t head_dim,
                       float *scores) {
    vf sums[RB][KEY_VECTORS];
    for (int r = 0; r < num; r++)
        for (int v = 0; v < KEY_VECTORS; v++) sums[r][v] = (vf){};
    for (int32_t d = 0; d < head_dim; d++) {
        vf key[KEY_VECTORS];
        for (int v = 0; v < KEY_VECTORS; v++) key[v] = load(keys + d * KEYS + v * LANES);
        for (int r = 0; r < num; r++) {
            vf query = splat(rows[r][d]);
            for (int v = 0; v < KEY_VECTORS; v++) sums[r][v] = vfma(query, key[v], sums[r][v]);
        }
    }
    for (int r = 0; r < num; r++)
        for (int v = 0; v < KEY_VECTORS; v++) store(scores + r * KEYS + v * LANES, sums[r][v]);
}

/* sums[r] = sums[r] * shrink[r] + weights[r] @ values, key by key in order. */
INLINE void add_values(const int num, const int width, const float *weights, const float *shrink,
                       const float *const *values, int32_t num_keys, float *sums,
                       int32_t head_dim) {
    vf acc[RB][PV];
    for (int r = 0; r < num; r++)
        for (int v = 0; v < width; v++)
            acc[r][v] = load(sums + r * head_dim + v * LANES) * splat(shrink[r]);
    for (int32_t j = 0; j < num_keys; j++) {
        vf value[PV];
        for (int v = 0; v < width; v++) value[v] = load(values[j] + v * LANES);
        for (int r = 0; r < num; r++) {
            vf weight = splat(weights[r * KEYS + j]);
            for (int v = 0; v < width; v++) acc[r][v] = vfma(weight, value[v], acc[r][v]);
        }
    }
    for (int r = 0; r < num; r++)
        for (int v = 0; v < width; v++) store(sums + r * head_dim + v * LANES, acc[r][v]);
}

INLINE void add_all_values(const int num, const float *weights, const float *shrink,
                           const float *const *values, int32_t num_keys, float *sums,
                           int32_t head_dim) {
    const float *shifted[KEYS];
    int32_t d = 0;
    for (; d + PV * LANES <= head_dim; d += PV * LANES) {
        for (int32_t j = 0; j < num_keys; j++) shifted[j] = values[j] + d;
        add_values(num, PV, weights, shrink, shifted, num_keys, sums + d, head_dim);
    }
    for (; d < head_dim; d += LANES) {
        for (int32_t j = 0; j < num_keys; j++) shifted[j] = values[j] + d;
        add_values(num, 1, weights, shrink, shifted, num_keys, sums + d, head_dim);
    }
}

/* [num_keys][head_dim] to [head_dim][KEYS]; missing keys repeat the last. */
INLINE void transpose_keys(const float *const *k, int32_t num_keys, int32_t head_dim, float *to) {
    for (int32_t j = 0; j < KEYS; j += LANES) {
        if (j >= num_keys) {
            for (int32_t d = 0; d < head_dim; d++) store(to + d * KEYS + j, (vf){});
            continue;
        }
        for (int32_t d = 0; d < head_dim; d += LANES) {
            vf block[LANES];
            for (int l = 0; l < LANES; l++)
                block[l] = load(k[j + l < num_keys ? j + l : num_keys - 1] + d);
            transpose(block);
            for (int l = 0; l < LANES; l++) store(to + (d + l) * KEYS + j, block[l]);
        }
    }
}

/* One row's scores of a step's keys [0, visible) after [0, hidden), turned into weights; updates
 * the row's maximum and sum, and gives the factor that its earlier sums shrink by. */
INLINE float soften(float *scores, int32_t hidden, int32_t visible, const attention *a, float *most,
                    float *total) {
    float lanes[LANES];
    for (int l = 0; l < LANES; l++) lanes[l] = (float)l;
    vf index = load(lanes), top = splat(-INFINITY), s[KEY_VECTORS];
    for (int v = 0; v < KEY_VECTORS; v++) {
        vf at = index + splat((float)(v * LANES));
        s[v] = load(scores + v * LANES) * splat(a->scale);
        if (a->softcap > 0) s[v] = splat(a->softcap) * vtanh(s[v] / splat(a->softcap));
        vi seen = (at >= splat((float)hidden)) & (at < splat((float)visible));
        s[v] = (vf)(((vi)s[v] & seen) | ((vi)splat(-INFINITY) & ~seen));
        top = vmax(s[v], top);
    }
    float before = *most, now = max_lanes(top);
    if (before > now) now = before;
    vf sum = {};
    for (int v = 0; v < KEY_VECTORS; v++) {
        vf weight = vexp(s[v] - splat(now));
        store(scores + v * LANES, weight);
        sum += weight;
    }
    float shrink = vexp(splat(before - now))[0];
    *most = now;
    *total = *total * shrink + sum_lanes(sum);
    return shrink;
}

/* Add a segment's (maximum, sum, weighted values) to the running ones. */
INLINE void merge_segment(float most, float total, const float *values, float *run_most,
                          float *run_total, float *run_values, int32_t head_dim) {
    if (most == -INFINITY) return;
    float now = most > *run_most ? most : *run_most;
    float old = vexp(splat(*run_most - now))[0], new = vexp(splat(most - now))[0];
    *run_total = *run_total * old + total * new;
    for (int32_t d = 0; d < head_dim; d += LANES)
        store(run_values + d,
              vfma(load(run_values + d), splat(old), load(values + d) * splat(new)));
    *run_most = now;
}

INLINE void finish_row(float total, const float *values, int32_t head_dim, float *out) {
    for (int32_t d = 0; d < head_dim; d += LANES) store(out + d, load(values + d) / splat(total));
}

/* partials: [num] of head_dim values, maximum, sum, `stride` apart. */
static void merge(const float *partials, int32_t num, int64_t stride, int32_t head_dim, float *out) {
    float values[MAX_HEAD_DIM] = {0}, most = -INFINITY, total = 0;
    for (int32_t i = 0; i < num; i++, partials += stride)
        merge_segment(partials[head_dim], partials[head_dim + 1], partials, &most, &total, values,
                      head_dim);
    finish_row(total, values, head_dim, out);
}

typedef struct {
    const float *rows[MAX_TILE_ROWS];
    int32_t positions[MAX_TILE_ROWS];
    float most[MAX_TILE_ROWS], total[MAX_TILE_ROWS];
    float values[MAX_TILE_FLOATS];
    int32_t num_rows;
} tile;

/* A loop for every number of rows up to RB, so that it is known in each. */
#if RB == 4
#define BY_ROWS(num, run, ...)                 \
    do {                                       \
        if ((num) == 4) run(4, __VA_ARGS__);   \
        else if ((num) == 3) run(3, __VA_ARGS__); \
        else if ((num) == 2) run(2, __VA_ARGS__); \
        else run(1, __VA_ARGS__);              \
    } while (0)
#else
#define BY_ROWS(num, run, ...)               \
    do {                                     \
        if ((num) == 2) run(2, __VA_ARGS__); \
        else run(1, __VA_ARGS__);            \
    } while (0)
#endif

/* The keys [first, stop) of one step, at most KEYS, for all rows that see any of them. Rows lie in
 * the order of their positions, so those that do are neighbours. */
static void attend_keys(const attention *a, const batch *b, const attention_item *item, tile *t,
                        int32_t first, int32_t stop) {
    const int32_t head_dim = a->head_dim, num_keys = stop - first;
    const float *k[KEYS], *v[KEYS];
    const int32_t *table = b->block_tables + item->seq * b->table_stride;
    for (int32_t j = 0; j < num_keys; j++) {
        int64_t slot = (int64_t)table[(first + j) / b->block_size] * b->block_size +
                       (first + j) % b->block_size;
        int64_t at = (slot * a->num_kv_heads + item->kv_head) * head_dim;
        k[j] = a->k + at;
        v[j] = a->v + at;
    }
    int32_t from = 0, to = t->num_rows;
    while (from < to && t->positions[from] < first) from++;
    while (a->window && to > from && t->positions[to - 1] - a->window >= stop - 1) to--;
    if (from == to) return;
    float keys[MAX_HEAD_DIM * KEYS] __attribute__((aligned(64)));
    float scores[RB * KEYS] __attribute__((aligned(64))), shrink[RB];
    transpose_keys(k, num_keys, head_dim, keys);
    for (int32_t row = from, num; row < to; row += num) {
        num = to - row < RB ? to - row : RB;
        BY_ROWS(num, score_rows, t->rows + row, keys, head_dim, scores);
        int32_t farthest = 0;
        for (int r = 0; r < num; r++) {
            int32_t position = t->positions[row + r];
            int32_t visible = position - first + 1 < num_keys ? position - first + 1 : num_keys;
            int32_t hidden = a->window ? position + 1 - a->window - first : 0;
            if (hidden < 0) hidden = 0;
            if (visible > farthest) farthest = visible;
            shrink[r] = 1;
            if (hidden < visible)
                shrink[r] = soften(scores + r * KEYS, hidden, visible, a, t->most + row + r,
                                   t->total + row + r);
            else
                memset(scores + r * KEYS, 0, KEYS * sizeof(float));
        }
        float *sums = t->values + row * head_dim;
        BY_ROWS(num, add_all_values, scores, shrink, v, farthest, sums, head_dim);
    }
}

static void attend(const attention *a, const batch *b, const attention_item *item) {
    const int32_t group = a->num_heads / a->num_kv_heads, head_dim = a->head_dim;
    tile t;
    float most[MAX_TILE_ROWS], total[MAX_TILE_ROWS], values[MAX_TILE_FLOATS];
    t.num_rows = item->num_queries * group;
    for (int32_t r = 0; r < t.num_rows; r++) {
        int32_t head = item->kv_head * group + r % group;
        t.rows[r] = a->query + (item->token + r / group) * a->query_stride + head * head_dim;
        t.positions[r] = item->position + r / group;
        most[r] = -INFINITY, total[r] = 0;
    }
    const int32_t end = item->position + item->num_queries;
    memset(values, 0, sizeof(float) * t.num_rows * head_dim);
    for (int32_t s = item->first_segment; s < item->last_segment; s++) {
        for (int32_t r = 0; r < t.num_rows; r++) t.most[r] = -INFINITY, t.total[r] = 0;
        memset(t.values, 0, sizeof(float) * t.num_rows * head_dim);
        int32_t stop = (s + 1) * SEGMENT < end ? (s + 1) * SEGMENT : end;
        for (int32_t first = s * SEGMENT; first < stop; first += KEYS)
            attend_keys(a, b, item, &t, first, first + KEYS < stop ? first + KEYS : stop);
        for (int32_t r = 0; r < t.num_rows; r++) {
            float *own = t.values + r * head_dim;
            if (item->partial) {
                float *to = item->partial + r * (head_dim + 2);
                memcpy(to, own, sizeof(float) * head_dim);
                to[head_dim] = t.most[r], to[head_dim + 1] = t.total[r];
            } else {
                merge_segment(t.most[r], t.total[r], own, most + r, total + r,
                              values + r * head_dim, head_dim);
            }
        }
    }
    for (int32_t r = 0; r < t.num_rows && !item->partial; r++) {
        int64_t head = (int64_t)(item->token + r / group) * a->num_heads + item->kv_head * group +
                       r % group;
        finish_row(total[r], values + r * head_dim, head_dim, a->output + head * head_dim);
    }
}
