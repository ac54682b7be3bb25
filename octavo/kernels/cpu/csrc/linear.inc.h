/* Rounding activations and weights to 8 bits, and matrix multiplication. */

#define GROUP_VECTORS (GROUP / LANES)

INLINE vf largest(const vf *values) {
    vf most = {};
    for (int v = 0; v < GROUP_VECTORS; v++) most = vmax(most, vabs(values[v]));
    return most;
}

#ifdef add_neighbours
/* The same, or 127/128 of the largest sum of two neighbours whose signs are the same. */
INLINE vf largest_sum(const vf *values) {
    vf most = {}, none = {};
    for (int v = 0; v < GROUP_VECTORS; v += 2) {
        vf a = values[v], b = values[v + 1];
        most = vmax(most, add_neighbours(vmax(a, none), vmax(b, none)));
        most = vmax(most, -add_neighbours(vmin(a, none), vmin(b, none)));
    }
    return vmax(largest(values), most * splat(127.0f / 128));
}
#else
#define largest_sum largest
#endif

/* What a group is divided by so that `most` becomes 127; no number if one of its values is none, or
 * infinite. */
INLINE float scale_of(const vf *values, vf most) {
    vf zero = {};
    for (int v = 0; v < GROUP_VECTORS; v++) zero = vfma(values[v], splat(0), zero);
    return max_lanes(most) / 127.0f + sum_lanes(zero);
}

/* A group's values times `inverse`, as bytes; returns their sum. A value that is no number is one in
 * the scale; here it must only stay in range. */
INLINE float round_group(const vf *values, float inverse, int8_t *to) {
    vi rounded[GROUP_VECTORS], sums = {};
    for (int v = 0; v < GROUP_VECTORS; v++) {
        rounded[v] = round_to_int(vmax(vmin(values[v] * splat(inverse), splat(127)), splat(-127)));
        sums += rounded[v];
    }
    narrow_group(rounded, to);
    return sum_lanes(to_float(sums));
}

/* A row of numbers of any type as GGUF's Q8_0 blocks; a last group that is not full is padded. */
INLINE void row_to_q8_0(const int type, const uint8_t *x, int64_t size, uint8_t *block) {
    const int64_t width = width_of(type);
    for (int64_t i = 0; i < size; i += GROUP, block += 34) {
        uint8_t tail[4 * GROUP];
        const uint8_t *from = x + i * width;
        if (size - i < GROUP) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, from, (size_t)((size - i) * width));
            from = tail;
        }
        vf values[GROUP_VECTORS];
        for (int v = 0; v < GROUP_VECTORS; v++)
            values[v] = load_number(type, from + v * LANES * width);
        uint16_t half = float_to_half(scale_of(values, largest(values)));
        float scale = half_to_float(half), inverse = scale > 0 ? 1 / scale : 0;
        memcpy(block, &half, 2);
        round_group(values, inverse, (int8_t *)block + 2);
    }
}

static void to_q8_0(const uint8_t *x, int32_t type, int64_t size, uint8_t *blocks) {
    if (type == FLOAT32)
        row_to_q8_0(FLOAT32, x, size, blocks);
    else if (type == BFLOAT16)
        row_to_q8_0(BFLOAT16, x, size, blocks);
    else
        row_to_q8_0(FLOAT16, x, size, blocks);
}

static void quantize(const float *x, int32_t in_features, activations *to, int64_t row) {
    for (int32_t g = 0; g < to->num_groups; g++) {
        int64_t cell = cell_of(to, row) + g * CELL_ROWS;
        int8_t *q = to->q + first_four(to, row) + g * CELL_ROWS * GROUP, bytes[GROUP];
        float tail[GROUP];
        const float *from = x + g * GROUP;
        if (in_features - g * GROUP < GROUP) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, from, (size_t)(in_features - g * GROUP) * sizeof(float));
            from = tail;
        }
        vf values[GROUP_VECTORS];
        for (int v = 0; v < GROUP_VECTORS; v++) values[v] = load(from + v * LANES);
        float scale = scale_of(values, to->kind == Q8_0 ? largest_sum(values) : largest(values));
        float inverse = scale > 0 ? 1.0f / scale : 0.0f;
        float sum = round_group(values, inverse, bytes);
        for (int v = 0; v < FOURS; v++) memcpy(FOUR(q, v, 0), bytes + 4 * v, 4);
        to->scale[cell] = scale;
        to->offset[cell] = -to->zero * (int32_t)sum;
        to->xsum[cell] = scale * sum;
    }
}

/* Groups between what is read and what is fetched from memory: when few rows take part, weights come
 * from beyond the second-level cache as fast as they are asked for. */
#define AHEAD 16

/* A group of one panel, a byte for each weight: inputs 4v to 4v + 3 of all its outputs in vector v. */
INLINE void unpack(const int kind, const uint8_t *panel, vb *weights) {
    const vbu *packed = (const vbu *)panel;
    for (int v = 0; v < FOURS; v++) {
        if (kind == Q8_0)
            weights[v] = packed[v];
        else if (v % 2 == 0)
            weights[v] = packed[v / 2] & 15;
        else
            weights[v] = (vb)((vu)packed[v / 2] >> 4) & 15;
    }
}

/* `num` rows of activations, all of one cell, times one panel: LANES results each. */
INLINE void multiply_panel(const int num, const int kind, const uint8_t *panel,
                           const activations *x, int64_t row, vf *result) {
    const int32_t num_groups = x->num_groups;
    const size_t quants = (kind == Q8_0 ? 32 : 16) * LANES;
    const size_t group_size = group_bytes(kind, LANES);
    const int8_t *q = x->q + first_four(x, row);
    int64_t cell = cell_of(x, row);
    for (int r = 0; r < num; r++) result[r] = (vf){};
    for (int32_t g = 0; g < num_groups;
         g++, panel += group_size, q += CELL_ROWS * GROUP, cell += CELL_ROWS) {
        for (size_t i = 0; i < group_size; i += 64)
            __builtin_prefetch(panel + AHEAD * group_size + i);
        vb weights[FOURS];
        unpack(kind, panel, weights);
        vi dots[MR];
        for (int r = 0; r < num; r++)
            dots[r] = kind == Q4_1 ? (vi){} : x->offset[cell + r] - (vi){};
        dot(kind, num, weights, q, dots);
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
    const size_t group_size = group_bytes(kind, LANES);
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
            vf result[MR];
            num = row_end - row;
            if (num >= MR) {
                num = MR;
                multiply_panel(MR, kind, panel, x, row, result);
#if MR > 4
            } else if (num >= 4) {
                num = 4;
                multiply_panel(4, kind, panel, x, row, result);
#endif
            } else if (num >= 2) {
                num = 2;
                multiply_panel(2, kind, panel, x, row, result);
            } else {
                multiply_panel(1, kind, panel, x, row, result);
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
