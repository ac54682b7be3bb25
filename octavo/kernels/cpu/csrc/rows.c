/* What the functions that Python calls share, and those that work on rows one by one: each is a loop
 * over the pool. */
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
void norm_all(const float *x, int64_t x_stride, float *residual, const float *weight, float *out,
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
    norm_all(x, x_stride, residual, weight, out, num_rows, size, eps, add_one);
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
void rotate_all(float *x, int64_t num_tokens, int64_t token_stride, int32_t num_heads,
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
    rotate_all(x, num_tokens, token_stride, num_heads, head_stride, cos, sin, rot_dim);
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
void gate_all(const float *gate_up, int64_t stride, float *out, int64_t num_rows, int64_t size,
              int32_t act) {
    row_context c = {.x = (float *)gate_up, .out = out, .num_rows = num_rows, .size = size,
                     .token_stride = stride, .option = act};
    c.num_chunks = row_chunks(num_rows, size + 1);
    pool_run(c.num_chunks, gate_rows, &c);
}

EXPORT void octavo_gate(const float *gate_up, int64_t stride, float *out, int64_t num_rows,
                        int64_t size, int32_t act) {
    pthread_mutex_lock(&one_caller);
    gate_all(gate_up, stride, out, num_rows, size, act);
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
