/* Attention over blocks of a cache, in place. */

#define KEYS 32 /* keys per step; scores of a row are KEYS / LANES vectors */
#define KEY_VECTORS (KEYS / LANES)
#define RB 4 /* rows at once */

/* As many of `most` vectors as leave room for the sums of `num` rows in registers. */
INLINE int fitting(const int num, const int most) {
    return num * most <= SUMS ? most : num * most <= 2 * SUMS ? most / 2 : most / 4;
}

/* Scores of `num` rows with a step's keys: each a sum over head_dim in order. Dimension d of keys
 * v * LANES and on lies at k[v] + d * stride. */
INLINE void score_rows(const int num, const int type, const float *const *rows,
                       const uint8_t *const *k, int64_t stride, int32_t head_dim, float *scores) {
    const int width = fitting(num, KEY_VECTORS);
    for (int from = 0; from < KEY_VECTORS; from += width) {
        vf sums[RB][KEY_VECTORS];
        for (int r = 0; r < num; r++)
            for (int v = 0; v < width; v++) sums[r][v] = (vf){};
        for (int32_t d = 0; d < head_dim; d++) {
            vf query[RB];
            for (int r = 0; r < num; r++) query[r] = splat(rows[r][d]);
            for (int v = 0; v < width; v++) {
                vf key = load_number(type, k[from + v] + d * stride);
                for (int r = 0; r < num; r++) sums[r][v] = vfma(query[r], key, sums[r][v]);
            }
        }
        for (int r = 0; r < num; r++)
            for (int v = 0; v < width; v++) store(scores + r * KEYS + (from + v) * LANES, sums[r][v]);
    }
}

/* sums[r] = sums[r] * shrink[r] + weights[r] @ values, key by key in order, from dimension d on. */
INLINE void add_some(const int num, const int width, const int type, const float *weights,
                     const float *shrink, const uint8_t *const *values, int32_t num_keys,
                     float *sums, int32_t head_dim, int32_t d) {
    const int64_t at = d * width_of(type);
    vf acc[RB][4];
    for (int r = 0; r < num; r++)
        for (int v = 0; v < width; v++)
            acc[r][v] = load(sums + r * head_dim + d + v * LANES) * splat(shrink[r]);
    for (int32_t j = 0; j < num_keys; j++) {
        vf weight[RB];
        for (int r = 0; r < num; r++) weight[r] = splat(weights[r * KEYS + j]);
        for (int v = 0; v < width; v++) {
            vf value = load_number(type, values[j] + at + v * LANES * width_of(type));
            for (int r = 0; r < num; r++) acc[r][v] = vfma(weight[r], value, acc[r][v]);
        }
    }
    for (int r = 0; r < num; r++)
        for (int v = 0; v < width; v++) store(sums + r * head_dim + d + v * LANES, acc[r][v]);
}

INLINE void add_values(const int num, const int type, const float *weights, const float *shrink,
                       const uint8_t *const *values, int32_t num_keys, float *sums,
                       int32_t head_dim) {
    const int width = fitting(num, 4);
    int32_t d = 0;
    for (; d + width * LANES <= head_dim; d += width * LANES)
        add_some(num, width, type, weights, shrink, values, num_keys, sums, head_dim, d);
    for (; d < head_dim; d += LANES)
        add_some(num, 1, type, weights, shrink, values, num_keys, sums, head_dim, d);
}

/* A step's keys and values where they lie in the cache: keys of `span` tokens side by side from
 * keys[i] on, dimension by dimension `stride` bytes apart, and values token by token. */
typedef struct {
    const uint8_t *keys[KEYS], *values[KEYS];
    int64_t stride;
    int32_t span, num_keys;
} step;

/* The same by vectors of keys; those beyond the end are any. */
INLINE void find_vectors(const int type, const step *s, const uint8_t **keys) {
    for (int v = 0; v < KEY_VECTORS; v++) {
        int32_t j = least(v * LANES, (s->num_keys - 1) / LANES * LANES);
        keys[v] = s->keys[j / s->span] + j % s->span * width_of(type);
    }
}

/* Keys become [head_dim][KEYS] floats, values [num_keys][head_dim] floats. */
INLINE void widen(const int type, const step *s, int32_t head_dim, float *keys, float *values) {
    const int64_t width = width_of(type);
    const uint8_t *vectors[KEY_VECTORS] = {0};
    uint8_t together[KEYS * 4] = {0}; /* blocks that are shorter than a vector */
    if (s->span >= LANES) find_vectors(type, s, vectors);
    for (int32_t d = 0; d < head_dim; d++) {
        for (int32_t j = 0; s->span < LANES && j < s->num_keys; j += s->span)
            memcpy(together + j * width, s->keys[j / s->span] + d * s->stride, s->span * width);
        for (int v = 0; v < KEY_VECTORS; v++) {
            const uint8_t *from = s->span < LANES ? together + v * LANES * width
                                                  : vectors[v] + d * s->stride;
            store(keys + d * KEYS + v * LANES, load_number(type, from));
        }
    }
    for (int32_t j = 0; j < s->num_keys; j++)
        for (int32_t d = 0; d < head_dim; d += LANES)
            store(values + j * head_dim + d, load_number(type, s->values[j] + d * width));
}

/* One row's scores of a step's keys [0, visible) after [0, hidden), turned into weights; updates
 * the row's maximum and sum, and gives the factor that its earlier sums shrink by. */
INLINE float soften(float *scores, int32_t hidden, int32_t visible, const attention *a, float *most,
                    float *total) {
    vf top = splat(-INFINITY), sum = {};
    for (int v = 0; v < KEY_VECTORS; v++) {
        vf score = load(scores + v * LANES) * splat(a->scale);
        if (a->softcap > 0) score = splat(a->softcap) * vtanh(score / splat(a->softcap));
        store(scores + v * LANES, score);
    }
    for (int32_t j = 0; j < hidden; j++) scores[j] = -INFINITY;
    for (int32_t j = visible; j < KEYS; j++) scores[j] = -INFINITY;
    for (int v = 0; v < KEY_VECTORS; v++) top = vmax(load(scores + v * LANES), top);
    float before = *most, now = max_lanes(top), shrink = 1;
    if (before < now) {
        shrink = vexp_down(splat(before - now))[0];
        *most = now;
    } else {
        now = before;
    }
    for (int v = 0; v < KEY_VECTORS; v++) {
        vf weight = vexp_down(load(scores + v * LANES) - splat(now));
        store(scores + v * LANES, weight);
        sum += weight;
    }
    *total = *total * shrink + sum_lanes(sum);
    return shrink;
}

/* Add a segment's (maximum, sum, weighted values) to the running ones. */
INLINE void merge_segment(float most, float total, const float *values, float *run_most,
                          float *run_total, float *run_values, int32_t head_dim) {
    if (most == -INFINITY) return;
    float now = most > *run_most ? most : *run_most;
    float old = vexp_down(splat(*run_most - now))[0], new = vexp_down(splat(most - now))[0];
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
    int32_t num_rows; /* of one KV head; those of the next lie behind them */
} tile;

/* A loop for every number of rows up to RB, so that it is known in each. */
#define BY_ROWS(num, run, ...)                    \
    do {                                          \
        if ((num) == 4) run(4, __VA_ARGS__);      \
        else if ((num) == 3) run(3, __VA_ARGS__); \
        else if ((num) == 2) run(2, __VA_ARGS__); \
        else run(1, __VA_ARGS__);                 \
    } while (0)

/* Rows [from, to) of a tile and the step of keys that begins at position `first`. */
INLINE void attend_step(const int type, const attention *a, tile *t, int32_t from, int32_t to,
                        int32_t first, const step *s, int64_t stride) {
    const int32_t head_dim = a->head_dim;
    float scores[RB * KEYS] __attribute__((aligned(64))), shrink[RB];
    for (int32_t row = from, num; row < to; row += num) {
        num = to - row < RB ? to - row : RB;
        BY_ROWS(num, score_rows, type, t->rows + row, s->keys, stride, head_dim, scores);
        int32_t farthest = 0;
        for (int r = 0; r < num; r++) {
            int32_t position = t->positions[row + r];
            int32_t visible = position - first + 1 < s->num_keys ? position - first + 1 : s->num_keys;
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
        BY_ROWS(num, add_values, type, scores, shrink, s->values, farthest, sums, head_dim);
    }
}

INLINE void attend_in(const int type, const attention *a, tile *t, int32_t from, int32_t to,
                      int32_t first, const step *s) {
    /* Few rows read the cache itself; for many it is widened once, and so are keys of blocks that
     * are shorter than a vector. */
    step other = {.num_keys = s->num_keys};
    if (s->span >= LANES && (to - from <= 2 * RB || type == FLOAT32)) {
        find_vectors(type, s, other.keys);
        memcpy(other.values, s->values, sizeof other.values);
        attend_step(type, a, t, from, to, first, &other, s->stride);
        return;
    }
    float keys[MAX_HEAD_DIM * KEYS] __attribute__((aligned(64)));
    float values[MAX_HEAD_DIM * KEYS] __attribute__((aligned(64)));
    widen(type, s, a->head_dim, keys, values);
    for (int v = 0; v < KEY_VECTORS; v++) other.keys[v] = (const uint8_t *)(keys + v * LANES);
    for (int j = 0; j < s->num_keys; j++)
        other.values[j] = (const uint8_t *)(values + j * a->head_dim);
    attend_step(FLOAT32, a, t, from, to, first, &other, KEYS * sizeof(float));
}

/* The keys [first, stop) of one step, at most KEYS, of one head, for all rows that see any of them.
 * Rows lie in the order of their positions, so those that do are neighbours. */
static void attend_keys(const attention *a, const batch *b, const attention_item *item, tile *t,
                        int32_t head, int32_t first, int32_t stop) {
    const int64_t width = width_of(a->kv_type), size = (int64_t)b->block_size * a->head_dim * width;
    const int32_t *table = b->block_tables + item->seq * b->table_stride;
    int32_t from = head * t->num_rows, to = from + t->num_rows;
    while (from < to && t->positions[from] < first) from++;
    while (a->window && to > from && t->positions[to - 1] - a->window >= stop - 1) to--;
    if (from == to) return;
    step s = {.stride = b->block_size * width, .num_keys = stop - first};
    s.span = b->block_size < KEYS ? b->block_size : KEYS;
    for (int32_t j = 0; j < s.num_keys; j += s.span) {
        int32_t block = (first + j) / b->block_size, offset = (first + j) % b->block_size;
        int64_t at = ((int64_t)table[block] * a->num_kv_heads + item->kv_head + head) * size;
        s.keys[j / s.span] = a->k + at + offset * width;
        for (int32_t i = 0; i < s.span; i++)
            s.values[j + i] = a->v + at + (offset + i) * a->head_dim * width;
    }
    if (a->kv_type == FLOAT16)
        attend_in(FLOAT16, a, t, from, to, first, &s);
    else if (a->kv_type == BFLOAT16)
        attend_in(BFLOAT16, a, t, from, to, first, &s);
    else
        attend_in(FLOAT32, a, t, from, to, first, &s);
}

static void attend(const attention *a, const batch *b, const attention_item *item) {
    const int32_t group = a->num_heads / a->num_kv_heads, head_dim = a->head_dim;
    tile t;
    float most[MAX_TILE_ROWS], total[MAX_TILE_ROWS], values[MAX_TILE_FLOATS];
    t.num_rows = item->num_queries * group;
    const int32_t num_rows = item->num_kv_heads * t.num_rows;
    int64_t heads[MAX_TILE_ROWS]; /* of the tokens from item->token on, one after the other */
    for (int32_t r = 0; r < num_rows; r++) {
        int32_t query = r % t.num_rows / group;
        int32_t head = (item->kv_head + r / t.num_rows) * group + r % group;
        heads[r] = (int64_t)(item->token + query) * a->num_heads + head;
        t.rows[r] = a->query + (item->token + query) * a->query_stride + head * head_dim;
        t.positions[r] = item->position + query;
        most[r] = -INFINITY, total[r] = 0;
    }
    const int32_t end = item->position + item->num_queries;
    memset(values, 0, sizeof(float) * num_rows * head_dim);
    for (int32_t s = item->first_segment; s < item->last_segment; s++) {
        for (int32_t r = 0; r < num_rows; r++) t.most[r] = -INFINITY, t.total[r] = 0;
        memset(t.values, 0, sizeof(float) * num_rows * head_dim);
        int32_t stop = (s + 1) * SEGMENT < end ? (s + 1) * SEGMENT : end;
        for (int32_t first = s * SEGMENT; first < stop; first += KEYS)
            for (int32_t head = 0; head < item->num_kv_heads; head++)
                attend_keys(a, b, item, &t, head, first, first + KEYS < stop ? first + KEYS : stop);
        for (int32_t r = 0; r < num_rows; r++) {
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
    for (int32_t r = 0; r < num_rows && !item->partial; r++)
        finish_row(total[r], values + r * head_dim, head_dim, a->output + heads[r] * head_dim);
}
