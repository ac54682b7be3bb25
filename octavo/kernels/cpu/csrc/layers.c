/* A whole stack of transformer layers in one call: at one token a call from Python costs more than
 * most of the work. */
#include <string.h>

#include "native.h"

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
            norm_all(x, size, NULL, l->input_norm, normed, tokens, size, l->norm_eps,
                     l->norm_adds_one);
        } else {
            norm_all(x, size, residual, l->input_norm, normed, tokens, size, l->norm_eps,
                     l->norm_adds_one);
        }
        multiply_roles(&l->qkv, b, normed, size, l->qkv_bias, qkv);
        if (l->query_norm) {
            head_context c = {.l = l, .qkv = qkv, .width = width, .num_tokens = tokens};
            c.num_chunks = row_chunks(tokens, width / 4 + 1);
            pool_run(c.num_chunks, norm_heads, &c);
        }
        rotate_all(qkv, tokens, width, l->num_heads + l->num_kv_heads, head_dim, cos, sin, rot_dim);
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
        norm_all(x, size, residual, l->post_norm, normed, tokens, size, l->norm_eps,
                 l->norm_adds_one);
        multiply_roles(&l->gate_up, seen, normed, size, l->gate_up_bias, gate_up);
        gate_all(gate_up, 2 * inner, gated, tokens, inner, l->act);
        multiply_roles(&l->down, seen, gated, inner, l->down_bias, x);
    }
    pthread_mutex_unlock(&one_caller);
}
