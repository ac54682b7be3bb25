/* Attention over blocks of a cache, in place. */

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
INLINE void transpose_keys(const int type, const uint8_t *const *k, int32_t num_keys,
                           int32_t head_dim, float *to) {
    for (int32_t j = 0; j < KEYS; j += LANES) {
        if (j >= num_keys) {
            for (int32_t d = 0; d < head_dim; d++) store(to + d * KEYS + j, (vf){});
            continue;
        }
        for (int32_t d = 0; d < head_dim; d += LANES) {
            vf block[LANES];
            for (int l = 0; l < LANES; l++)
                block[l] = load_number(
                    type, k[j + l < num_keys ? j + l : num_keys - 1] + d * width_of(type));
            transpose(block);
            for (int l = 0; l < LANES; l++) store(to + (d + l) * KEYS + j, block[l]);
        }
    }
}

INLINE void widen(const int type, const uint8_t *from, int32_t head_dim, float *to) {
    for (int32_t d = 0; d < head_dim; d += LANES)
        store(to + d, load_number(type, from + d * width_of(type)));
}

/* A step's keys transposed, and where its values lie as floats, which may be in `wide`. */
INLINE void fetch(const int type, const uint8_t *const *k, const uint8_t *const *v,
                  int32_t num_keys, int32_t head_dim, float *keys, float *wide,
                  const float **values) {
    transpose_keys(type, k, num_keys, head_dim, keys);
    for (int32_t j = 0; j < num_keys; j++) {
        values[j] = type == FLOAT32 ? (const float *)v[j] : wide + j * head_dim;
        if (type != FLOAT32) widen(type, v[j], head_dim, wide + j * head_dim);
    }
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
    const int64_t width = width_of(a->kv_type);
    const uint8_t *k[KEYS], *v[KEYS];
    const int32_t *table = b->block_tables + item->seq * b->table_stride;
    for (int32_t j = 0; j < num_keys; j++) {
        int64_t slot = (int64_t)table[(first + j) / b->block_size] * b->block_size +
                       (first + j) % b->block_size;
        int64_t at = (slot * a->num_kv_heads + item->kv_head) * head_dim * width;
        k[j] = a->k + at;
        v[j] = a->v + at;
    }
    int32_t from = 0, to = t->num_rows;
    while (from < to && t->positions[from] < first) from++;
    while (a->window && to > from && t->positions[to - 1] - a->window >= stop - 1) to--;
    if (from == to) return;
    float keys[MAX_HEAD_DIM * KEYS] __attribute__((aligned(64)));
    float wide[MAX_HEAD_DIM * KEYS] __attribute__((aligned(64)));
    float scores[RB * KEYS] __attribute__((aligned(64))), shrink[RB];
    const float *values[KEYS];
    if (a->kv_type == FLOAT16)
        fetch(FLOAT16, k, v, num_keys, head_dim, keys, wide, values);
    else if (a->kv_type == BFLOAT16)
        fetch(BFLOAT16, k, v, num_keys, head_dim, keys, wide, values);
    else
        fetch(FLOAT32, k, v, num_keys, head_dim, keys, wide, values);
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
        BY_ROWS(num, add_all_values, scores, shrink, values, farthest, sums, head_dim);
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
