/* Attention over the pool: what a step's sequences ask of it is divided into items. */
#include <string.h>

#include "native.h"

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
    for (int64_t i = begin; i < end; i++)
        (c->items[i].in_tiles ? active->attend_tiles : active->attend)(c->a, c->b, &c->items[i]);
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

/* Items of one sequence's queries of its prompt, of about the same size, the longest sums first. */
static int32_t add_tile_items(const attention *a, attention_item *items, attention_item base,
                              int32_t num_queries, int32_t position, int32_t num_prompts) {
    int32_t group = a->num_heads / a->num_kv_heads, num = 0;
    int32_t row_floats = (int32_t)divide_up(a->head_dim, GROUP) * GROUP;
    int32_t most = MAX_PROMPT_FLOATS / row_floats / (2 * TILE) * (2 * TILE) / group;
    /* Few heads and many threads: items of fewer rows, so that all have something to do. */
    int64_t wanted = divide_up(4 * (int64_t)pool_threads(), (int64_t)a->num_kv_heads * num_prompts);
    int64_t parts = divide_up(num_queries, most);
    if (parts < wanted)
        parts = least(num_queries, least(wanted, divide_up(num_queries * group, 2 * TILE)));
    for (int64_t part = parts; part-- > 0;) {
        int32_t from = (int32_t)(num_queries * part / parts);
        base.num_queries = (int32_t)(num_queries * (part + 1) / parts) - from;
        for (base.kv_head = 0; base.kv_head < a->num_kv_heads; base.kv_head++, num++) {
            items[num] = base;
            items[num].token += from, items[num].position = position + from;
        }
    }
    return num;
}

/* How many of sequence i's queries, of which the first is `token`, belong to its prompt: the first
 * ones. `role` is where the search through roles stands. */
static int32_t prompt_queries(const batch *b, int32_t i, int32_t token, int32_t *role) {
    while (*role < b->num_roles && b->role_ends[*role] <= token) ++*role;
    if (*role == b->num_roles || *role % 2 == 0 || !b->seq_lens[i]) return 0;
    return least(b->query_lens[i], b->role_ends[*role] - token);
}

/* Items of all sequences: their queries of prompts apart from the others, where these take tiles. */
static void add_all(attention_context *c, int64_t num_segments, float *partials) {
    const attention *a = c->a;
    const batch *b = c->b;
    const int32_t has_tiles = active->attend_tiles && a->kv_type != FLOAT32;
    /* Memory is read in its order where there are enough items without a division by heads. */
    int32_t group = a->num_heads / a->num_kv_heads, together = 1;
    if (num_segments >= 4 * pool_threads()) together = least(a->num_kv_heads, tile_rows(a) / group);
    int32_t token = 0, role = 0, num_prompts = 0;
    for (int32_t i = 0; has_tiles && i < b->num_seqs; token += b->query_lens[i++])
        num_prompts += prompt_queries(b, i, token, &role) > 0;
    token = role = 0;
    for (int32_t i = 0; i < b->num_seqs; token += b->query_lens[i++]) {
        attention_item base = {.seq = i, .token = token, .num_kv_heads = 1, .in_tiles = 1};
        int32_t num_prompt = num_prompts ? prompt_queries(b, i, token, &role) : 0;
        if (num_prompt)
            c->num_items += add_tile_items(a, c->items + c->num_items, base, num_prompt,
                                           b->seq_lens[i] - b->query_lens[i], num_prompts);
        int32_t num_queries = b->query_lens[i] - num_prompt;
        int32_t split = num_queries == 1 && b->seq_lens[i] > SEGMENT;
        int32_t heads = num_queries == 1 ? together : 1;
        base.token += num_prompt, base.in_tiles = 0;
        for (int32_t h = 0; h < a->num_kv_heads && b->seq_lens[i]; h += heads) {
            base.kv_head = h, base.num_kv_heads = least(heads, a->num_kv_heads - h);
            c->num_items += add_items(a, c->items + c->num_items, base, num_queries, b->seq_lens[i],
                                      split, &partials);
        }
    }
}

/* Write the step's keys and values into the cache, then attend causally. */
void attend_batch(const attention *a, const batch *b, const float *key, int64_t key_stride,
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
    add_all(&c, segments, partials);
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
