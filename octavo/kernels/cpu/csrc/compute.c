/* The functions that Python calls to compute. Each is a few loops over the pool; `octavo_layers` runs
 * a whole stack of transformer layers, because at one token a call from Python costs more than most
 * of the work. */
#include <stdlib.h>
#include <string.h>

#include "native.h"

/* Memory that grows with need and is kept: mapping fresh pages costs more than most of the work. */
void *scratch(size_t num_bytes) {
    static void *memory;
    static size_t size;
    if (num_bytes > size) {
        free(memory);
        size = num_bytes + num_bytes / 2;
        if (posix_memalign(&memory, 64, size)) abort();
    }
    return memory;
}

/* Rows in chunks that are worth handing out: about `row_cost` nanoseconds each row. */
int32_t row_chunks(int64_t num_rows, int64_t row_cost) {
    int64_t worth = divide_up(4000, row_cost); /* rows */
    return least(divide_up(num_rows, worth), 8 * (int64_t)pool_threads());
}

/* ---- rows */

typedef struct {
    float *x;
    const float *a, *b;
    float *out, *residual;
    int64_t num_rows, size, token_stride, head_stride;
    int32_t num_chunks, num_heads, option;
    float eps;
} row_context;

static void norm_rows(void *context, int32_t chunk) {
    const row_context *c = context;
    ROWS_OF(chunk, c->num_rows, c->num_chunks);
    for (int64_t i = begin; i < end; i++)
        active->rms_norm(c->x + i * c->token_stride, c->residual ? c->residual + i * c->size : NULL,
                         c->a, c->out + i * c->size, c->size, c->eps, c->option);
}

/* out = norm(x + residual); residual, where there is one, becomes x + residual. */
static void norm(const float *x, int64_t x_stride, float *residual, const float *weight, float *out,
                 int64_t num_rows, int64_t size, float eps, int32_t add_one) {
    row_context c = {.x = (float *)x, .a = weight, .out = out, .residual = residual,
                     .num_rows = num_rows, .size = size, .token_stride = x_stride,
                     .option = add_one, .eps = eps};
    c.num_chunks = row_chunks(num_rows, size / 4 + 1);
    pool_run(c.num_chunks, norm_rows, &c);
}

EXPORT void octavo_rms_norm(const float *x, int64_t x_stride, float *residual, const float *weight,
                            float *out, int64_t num_rows, int64_t size, float eps,
                            int32_t add_one) {
    pthread_mutex_lock(&one_caller);
    norm(x, x_stride, residual, weight, out, num_rows, size, eps, add_one);
    pthread_mutex_unlock(&one_caller);
}

static void rotate_rows(void *context, int32_t chunk) {
    const row_context *c = context;
    ROWS_OF(chunk, c->num_rows, c->num_chunks);
    for (int64_t i = begin; i < end; i++)
        for (int32_t h = 0; h < c->num_heads; h++)
            active->rotate(c->x + i * c->token_stride + h * c->head_stride, c->a + i * c->size,
                           c->b + i * c->size, c->size);
}

/* Rotate the leading rot_dim of every head in place. cos, sin: [num_tokens][rot_dim]. */
static void rotate(float *x, int64_t num_tokens, int64_t token_stride, int32_t num_heads,
                   int64_t head_stride, const float *cos, const float *sin, int64_t rot_dim) {
    row_context c = {.x = x, .a = cos, .b = sin, .num_rows = num_tokens, .size = rot_dim,
                     .token_stride = token_stride, .head_stride = head_stride,
                     .num_heads = num_heads};
    c.num_chunks = row_chunks(num_tokens, num_heads * rot_dim / 4 + 1);
    pool_run(c.num_chunks, rotate_rows, &c);
}

EXPORT void octavo_rotate(float *x, int64_t num_tokens, int64_t token_stride, int32_t num_heads,
                          int64_t head_stride, const float *cos, const float *sin,
                          int64_t rot_dim) {
    pthread_mutex_lock(&one_caller);
    rotate(x, num_tokens, token_stride, num_heads, head_stride, cos, sin, rot_dim);
    pthread_mutex_unlock(&one_caller);
}

static void gate_rows(void *context, int32_t chunk) {
    const row_context *c = context;
    ROWS_OF(chunk, c->num_rows, c->num_chunks);
    for (int64_t i = begin; i < end; i++) {
        const float *gate = c->x + i * c->token_stride;
        active->gate(gate, gate + c->size, c->out + i * c->size, c->size, c->option);
    }
}

/* out[i] = act(gate_up[i][:size]) * gate_up[i][size:]. */
static void gate(const float *gate_up, int64_t stride, float *out, int64_t num_rows, int64_t size,
                 int32_t act) {
    row_context c = {.x = (float *)gate_up, .out = out, .num_rows = num_rows, .size = size,
                     .token_stride = stride, .option = act};
    c.num_chunks = row_chunks(num_rows, size + 1);
    pool_run(c.num_chunks, gate_rows, &c);
}

EXPORT void octavo_gate(const float *gate_up, int64_t stride, float *out, int64_t num_rows,
                        int64_t size, int32_t act) {
    pthread_mutex_lock(&one_caller);
    gate(gate_up, stride, out, num_rows, size, act);
    pthread_mutex_unlock(&one_caller);
}

typedef struct {
    const float *x;
    int64_t size;
    int64_t *out;
} argmax_context;

static void argmax_row(void *context, int32_t row) {
    const argmax_context *c = context;
    c->out[row] = active->argmax(c->x + row * c->size, c->size);
}

/* The first index of each row's largest value. */
EXPORT void octavo_argmax(const float *x, int64_t num_rows, int64_t size, int64_t *out) {
    pthread_mutex_lock(&one_caller);
    argmax_context c = {x, size, out};
    pool_run((int32_t)num_rows, argmax_row, &c);
    pthread_mutex_unlock(&one_caller);
}

/* ---- attention */

typedef struct {
    const attention *a;
    const batch *b;
    attention_item *items;
    int32_t num_items, num_chunks;
    const float *key, *value;
    int64_t key_stride, value_stride;
} attention_context;

/* A token's key of one head in the place of another: its dimensions lie a block apart. */
static void spread(const float *key, int32_t type, int32_t head_dim, int32_t block_size, uint8_t *k) {
    if (type == FLOAT32) {
        for (int32_t d = 0; d < head_dim; d++) ((float *)k)[d * block_size] = key[d];
        return;
    }
    uint16_t halves[MAX_HEAD_DIM], *to = (uint16_t *)k;
    active->narrow(key, type, head_dim, (uint8_t *)halves);
    for (int32_t d = 0; d < head_dim; d++) to[d * block_size] = halves[d];
}

static void write_rows(void *context, int32_t chunk) {
    const attention_context *c = context;
    const int32_t type = c->a->kv_type, head_dim = c->a->head_dim, block_size = c->b->block_size;
    const int64_t width = width_of(type), row_bytes = head_dim * width;
    ROWS_OF(chunk, c->b->num_tokens, c->num_chunks);
    for (int64_t i = begin; i < end; i++) {
        int64_t block = c->b->slots[i] / block_size, offset = c->b->slots[i] % block_size;
        int64_t at = block * c->a->num_kv_heads * block_size * row_bytes;
        for (int32_t head = 0; head < c->a->num_kv_heads; head++, at += block_size * row_bytes) {
            const float *value = c->value + i * c->value_stride + head * head_dim;
            uint8_t *v = c->a->v + at + offset * row_bytes;
            spread(c->key + i * c->key_stride + head * head_dim, type, head_dim, block_size,
                   c->a->k + at + offset * width);
            if (type == FLOAT32)
                memcpy(v, value, (size_t)row_bytes);
            else
                active->narrow(value, type, head_dim, v);
        }
    }
}

static void attend_items(void *context, int32_t chunk) {
    const attention_context *c = context;
    ROWS_OF(chunk, c->num_items, c->num_chunks);
    for (int64_t i = begin; i < end; i++) active->attend(c->a, c->b, &c->items[i]);
}

static int32_t tile_rows(const attention *a) {
    return least(MAX_TILE_FLOATS / a->head_dim, MAX_TILE_ROWS);
}

/* Items of one sequence and some KV heads: [tiles of queries], or [segments] for a lone query. */
static int32_t add_items(const attention *a, attention_item *items, attention_item base,
                         int32_t query_len, int32_t seq_len, int32_t split, float **partials) {
    int32_t group = a->num_heads / a->num_kv_heads, first = seq_len - query_len, num = 0;
    if (split) {
        int32_t from = a->window && seq_len > a->window ? (seq_len - a->window) / SEGMENT : 0;
        for (int32_t s = from; s < (seq_len + SEGMENT - 1) / SEGMENT; s++, num++) {
            attention_item item = base;
            item.position = first, item.num_queries = 1;
            item.first_segment = s, item.last_segment = s + 1, item.partial = *partials;
            *partials += (size_t)base.num_kv_heads * group * (a->head_dim + 2);
            items[num] = item;
        }
        return num;
    }
    int32_t step = tile_rows(a) / (group * base.num_kv_heads);
    for (int32_t q = 0; q < query_len; q += step, num++) {
        attention_item item = base;
        item.token = base.token + q, item.position = first + q;
        item.num_queries = least(step, query_len - q);
        int32_t low = item.position + 1 - a->window;
        item.first_segment = a->window && low > 0 ? low / SEGMENT : 0;
        item.last_segment = (item.position + item.num_queries + SEGMENT - 1) / SEGMENT;
        items[num] = item;
    }
    return num;
}

/* Write the step's keys and values into the cache, then attend causally. */
static void attend_batch(const attention *a, const batch *b, const float *key, int64_t key_stride,
                         const float *value, int64_t value_stride) {
    int32_t group = a->num_heads / a->num_kv_heads;
    attention_context c = {.a = a, .b = b, .key = key, .key_stride = key_stride, .value = value,
                           .value_stride = value_stride};
    c.num_chunks = row_chunks(b->num_tokens, a->num_kv_heads * a->head_dim / 8 + 1);
    pool_run(c.num_chunks, write_rows, &c);
    int64_t most = 0, segments = 0, scores = 0;
    for (int32_t i = 0; i < b->num_seqs; i++) {
        int64_t own = divide_up(b->seq_lens[i], SEGMENT);
        most += a->num_kv_heads * (b->query_lens[i] + own);
        segments += own;
        scores += (int64_t)b->seq_lens[i] * b->query_lens[i] * a->num_heads;
    }
    size_t partial_bytes = (size_t)segments * a->num_heads * (a->head_dim + 2) * sizeof(float);
    partial_bytes = (partial_bytes + 63) / 64 * 64;
    char *memory = scratch(partial_bytes + (size_t)most * sizeof(attention_item));
    float *partials = (float *)memory;
    c.items = (attention_item *)(memory + partial_bytes);
    /* Memory is read in its order where there are enough items without a division by heads. */
    int32_t together = segments < 4 * pool_threads() ? 1 : least(a->num_kv_heads, tile_rows(a) / group);
    int32_t token = 0;
    for (int32_t i = 0; i < b->num_seqs; token += b->query_lens[i++]) {
        int32_t split = b->query_lens[i] == 1 && b->seq_lens[i] > SEGMENT;
        int32_t heads = b->query_lens[i] == 1 ? together : 1;
        for (int32_t h = 0; h < a->num_kv_heads && b->seq_lens[i]; h += heads) {
            attention_item base = {.seq = i, .kv_head = h, .token = token};
            base.num_kv_heads = least(heads, a->num_kv_heads - h);
            c.num_items += add_items(a, c.items + c.num_items, base, b->query_lens[i],
                                     b->seq_lens[i], split, &partials);
        }
    }
    c.num_chunks = least(c.num_items, divide_up(scores, 512)); /* of at least 512 scores */
    pool_run(c.num_chunks, attend_items, &c);
    size_t width = (size_t)a->head_dim + 2;
    for (int32_t i = 0, next; i < c.num_items; i = next) {
        const attention_item *item = &c.items[i];
        next = i + 1;
        if (!item->partial) continue;
        while (next < c.num_items && c.items[next].partial && c.items[next].seq == item->seq &&
               c.items[next].kv_head == item->kv_head)
            next++;
        int32_t rows = item->num_kv_heads * group;
        for (int32_t r = 0; r < rows; r++) {
            int64_t head = (int64_t)item->token * a->num_heads + item->kv_head * group + r;
            active->merge(item->partial + r * width, next - i, (int64_t)(rows * width), a->head_dim,
                          a->output + head * a->head_dim);
        }
    }
}

/* Whether these shapes fit the kernels' fixed buffers. */
EXPORT int32_t octavo_attention_fits(int32_t num_heads, int32_t num_kv_heads, int32_t head_dim) {
    int32_t group = num_heads / num_kv_heads;
    return head_dim % 16 == 0 && head_dim <= MAX_HEAD_DIM && group <= MAX_TILE_ROWS &&
           group * head_dim <= MAX_TILE_FLOATS;
}

EXPORT void octavo_attention(const attention *a, const batch *b, const float *key,
                             int64_t key_stride, const float *value, int64_t value_stride) {
    pthread_mutex_lock(&one_caller);
    attend_batch(a, b, key, key_stride, value, value_stride);
    pthread_mutex_unlock(&one_caller);
}

/* ---- a stack of layers */

typedef struct {
    matrix qkv, out, gate_up, down;
    const float *qkv_bias, *out_bias, *gate_up_bias, *down_bias;         /* NULL: none */
    const float *input_norm, *post_norm, *query_norm, *key_norm;         /* the last two or NULL */
    int32_t num_heads, num_kv_heads, head_dim, window;
    float scale, softcap;
    float norm_eps, head_norm_eps;
    int32_t norm_adds_one, act;
} layer;

typedef struct {
    const attention *a;
    const layer *l;
    float *qkv;
    int64_t width, num_tokens;
    int32_t num_chunks;
} head_context;

static void norm_heads(void *context, int32_t chunk) {
    const head_context *c = context;
    const layer *l = c->l;
    ROWS_OF(chunk, c->num_tokens, c->num_chunks);
    for (int64_t i = begin; i < end; i++)
        for (int32_t h = 0; h < l->num_heads + l->num_kv_heads; h++) {
            float *x = c->qkv + i * c->width + h * l->head_dim;
            active->rms_norm(x, NULL, h < l->num_heads ? l->query_norm : l->key_norm, x,
                             l->head_dim, l->head_norm_eps, l->norm_adds_one);
        }
}

/* `multiply` for rows of both roles; a prompt's rows are multiplied apart from the others, where that
 * is another product. */
static void multiply_roles(const matrix *m, const batch *b, const float *x, int64_t x_stride,
                           const float *bias, float *out) {
    if (!active->linear_tiles) {
        multiply(m, x, b->role_ends[b->num_roles - 1], x_stride, bias, out);
        return;
    }
    int64_t begin = 0;
    for (int32_t i = 0; i < b->num_roles; begin = b->role_ends[i++]) {
        int64_t num_rows = b->role_ends[i] - begin;
        if (num_rows)
            (i % 2 ? multiply_prompt : multiply)(m, x + begin * x_stride, num_rows, x_stride, bias,
                                                 out + begin * m->out_features);
    }
}

/* Move rows queries[i] to rows i, in place. */
static void pick_rows(float *x, int64_t stride, int64_t size, const int64_t *queries, int64_t num) {
    for (int64_t i = 0; i < num; i++)
        memmove(x + i * stride, x + queries[i] * stride, (size_t)size * sizeof(float));
}

/* Run `num` layers. x, [num_tokens][size], goes in as the embeddings and comes out as what is still
 * to be added to residual, which goes in undefined. k[i], v[i]: caches of layer i. The last layer
 * sees `last`, which may be b: x and residual come out with a row for each of its queries. `work`
 * holds num_tokens times octavo_layer_floats. */
EXPORT int64_t octavo_layer_floats(const layer *l) {
    return l->qkv.in_features + l->qkv.out_features + l->out.in_features +
           l->gate_up.out_features + l->down.in_features;
}

EXPORT void octavo_layers(const layer *layers, int32_t num, float *x, float *residual,
                          uint8_t *const *k, uint8_t *const *v, int32_t kv_type, const batch *b,
                          const batch *last, const float *cos, const float *sin, int64_t rot_dim,
                          float *work) {
    pthread_mutex_lock(&one_caller);
    int64_t tokens = b->num_tokens, size = layers->qkv.in_features;
    for (int32_t i = 0; i < num; i++) {
        const layer *l = &layers[i];
        int64_t width = l->qkv.out_features, head_dim = l->head_dim;
        int64_t inner = l->down.in_features;
        float *normed = work, *qkv = normed + tokens * size, *attended = qkv + tokens * width;
        float *gate_up = attended + tokens * l->out.in_features, *gated = gate_up + tokens * 2 * inner;
        if (i == 0) {
            memcpy(residual, x, (size_t)(tokens * size) * sizeof(float));
            norm(x, size, NULL, l->input_norm, normed, tokens, size, l->norm_eps, l->norm_adds_one);
        } else {
            norm(x, size, residual, l->input_norm, normed, tokens, size, l->norm_eps,
                 l->norm_adds_one);
        }
        multiply_roles(&l->qkv, b, normed, size, l->qkv_bias, qkv);
        if (l->query_norm) {
            head_context c = {.l = l, .qkv = qkv, .width = width, .num_tokens = tokens};
            c.num_chunks = row_chunks(tokens, width / 4 + 1);
            pool_run(c.num_chunks, norm_heads, &c);
        }
        rotate(qkv, tokens, width, l->num_heads + l->num_kv_heads, head_dim, cos, sin, rot_dim);
        attention a = {.query = qkv, .query_stride = width, .output = attended, .k = k[i],
                       .v = v[i], .num_heads = l->num_heads, .num_kv_heads = l->num_kv_heads,
                       .head_dim = l->head_dim, .window = l->window, .scale = l->scale,
                       .softcap = l->softcap, .kv_type = kv_type};
        const float *key = qkv + l->num_heads * head_dim, *value = key + l->num_kv_heads * head_dim;
        const batch *seen = i == num - 1 ? last : b;
        if (seen->queries) {
            tokens = seen->num_seqs;
            pick_rows(residual, size, size, seen->queries, tokens);
            pick_rows(qkv, width, l->num_heads * head_dim, seen->queries, tokens);
        }
        attend_batch(&a, seen, key, width, value, width);
        multiply_roles(&l->out, seen, attended, l->out.in_features, l->out_bias, x);
        norm(x, size, residual, l->post_norm, normed, tokens, size, l->norm_eps, l->norm_adds_one);
        multiply_roles(&l->gate_up, seen, normed, size, l->gate_up_bias, gate_up);
        gate(gate_up, 2 * inner, gated, tokens, inner, l->act);
        multiply_roles(&l->down, seen, gated, inner, l->down_bias, x);
    }
    pthread_mutex_unlock(&one_caller);
}
