/* Matrix multiplication over the pool, of two kinds: in 8 bits, for whatever was generated, and in
 * bfloat16 tiles, for prompts, where an instruction set has them. Which of them a row takes must
 * follow from the row alone, or its bits would depend on the rows around it. */
#include "native.h"

typedef struct {
    const matrix *m;
    activations *acts;
    const float *x, *bias;
    float *out;
    int64_t num_rows, x_stride, out_stride;
    int32_t num_chunks, num_panels, num_tiles;
} linear_context;

static void quantize_rows(void *context, int32_t chunk) {
    const linear_context *c = context;
    ROWS_OF(chunk, divide_up(c->num_rows, CELL_ROWS), c->num_chunks); /* cells share cache lines */
    int64_t stop = least(end * CELL_ROWS, c->num_rows);
    for (int64_t row = begin * CELL_ROWS; row < stop; row++)
        active->quantize(c->x + row * c->x_stride, c->m->in_features, c->acts, row);
}

/* Rows that are multiplied with a panel before the next one: what stays in the second-level cache. */
#define TILE_ROWS 128 /* a multiple of CELL_ROWS */

static void multiply_panels(void *context, int32_t chunk) {
    const linear_context *c = context;
    int32_t per_tile = c->num_chunks / c->num_tiles, tile = chunk / per_tile;
    int64_t row_end = least((int64_t)(tile + 1) * TILE_ROWS, c->num_rows);
    ROWS_OF(chunk % per_tile, c->num_panels, per_tile);
    active->linear(c->m, c->acts, (int64_t)tile * TILE_ROWS, row_end, c->bias, c->out,
                   c->out_stride, (int32_t)begin, (int32_t)end);
}

static activations make_activations(const matrix *m, int64_t num_rows) {
    int64_t cells = divide_up(num_rows, CELL_ROWS) * CELL_ROWS * m->num_groups;
    char *memory = scratch((size_t)cells * (GROUP + 12));
    activations a = {.q = (int8_t *)memory, .num_groups = m->num_groups, .kind = m->kind};
    a.zero = m->kind == Q4_0 ? 8 : m->kind == Q8_0 ? active->flip8 : 0;
    a.scale = (float *)(memory + cells * GROUP);
    a.offset = (int32_t *)(a.scale + cells);
    a.xsum = (float *)(a.offset + cells);
    return a;
}

void multiply(const matrix *m, const float *x, int64_t num_rows, int64_t x_stride,
              const float *bias, float *out) {
    activations acts = make_activations(m, num_rows);
    linear_context c = {m, &acts, x, bias, out, num_rows, x_stride, m->out_features, 0, 0, 0};
    int64_t cells = divide_up(num_rows, CELL_ROWS);
    c.num_chunks = row_chunks(cells, CELL_ROWS * (m->in_features / 4 + 1));
    pool_run(c.num_chunks, quantize_rows, &c);
    c.num_panels = (int32_t)divide_up(m->out_features, active->lanes);
    c.num_tiles = (int32_t)divide_up(num_rows, TILE_ROWS);
    /* Chunks of at least 16k multiplications, but enough of them that the last one is short. */
    int64_t panel_work = (int64_t)active->lanes * m->in_features * least(num_rows, TILE_ROWS);
    int64_t most = divide_up(c.num_panels * panel_work, 1 << 14);
    int32_t per_tile = least(least(c.num_panels, most), 8 * (int64_t)pool_threads());
    c.num_chunks = per_tile * c.num_tiles;
    pool_run(c.num_chunks, multiply_panels, &c);
}

/* ---- in tiles */

/* Activations of that many bytes stay in the second-level cache while weights pass by, ... */
#define NEAR_TILE_BYTES (640 << 10)
/* ... but weights are widened anew for every block of rows. */
#define MIN_BLOCK_ROWS 128

typedef struct {
    const matrix *m;
    const float *x, *bias;
    uint16_t *tiles;
    float *out;
    int64_t num_rows, x_stride, block_rows;
    int32_t num_chunks, num_pairs, num_blocks;
} tile_context;

static void narrow_tiles(void *context, int32_t chunk) {
    const tile_context *c = context;
    ROWS_OF(chunk, divide_up(c->num_rows, TILE), c->num_chunks);
    for (int64_t i = begin; i < end; i++)
        active->narrow_tile_rows(c->x + i * TILE * c->x_stride, c->x_stride,
                                 least(TILE, c->num_rows - i * TILE), c->m->in_features,
                                 c->tiles + i * TILE * GROUP * c->m->num_groups);
}

static void multiply_pairs(void *context, int32_t chunk) {
    const tile_context *c = context;
    int32_t per_block = c->num_chunks / c->num_blocks, block = chunk / per_block;
    int64_t row_end = least((block + 1) * c->block_rows, c->num_rows);
    ROWS_OF(chunk % per_block, c->num_pairs, per_block);
    active->linear_tiles(c->m, c->tiles, block * c->block_rows, row_end, c->bias, c->out,
                         c->m->out_features, (int32_t)begin, (int32_t)end);
}

void multiply_prompt(const matrix *m, const float *x, int64_t num_rows, int64_t x_stride,
                     const float *bias, float *out) {
    if (!active->linear_tiles) {
        multiply(m, x, num_rows, x_stride, bias, out);
        return;
    }
    if (!num_rows) return;
    int64_t row_bytes = (int64_t)m->num_groups * GROUP * sizeof(uint16_t);
    tile_context c = {.m = m, .x = x, .bias = bias, .out = out, .num_rows = num_rows,
                      .x_stride = x_stride};
    c.tiles = scratch((size_t)(divide_up(num_rows, TILE) * TILE * row_bytes));
    c.num_chunks = row_chunks(divide_up(num_rows, TILE), TILE * (m->in_features / 8 + 1));
    pool_run(c.num_chunks, narrow_tiles, &c);
    c.num_pairs = (int32_t)divide_up(m->out_features, 2 * TILE);
    int64_t most = NEAR_TILE_BYTES / row_bytes;
    /* Few outputs and many threads: blocks of fewer rows, so that all have something to do. */
    int64_t wanted = divide_up(4 * (int64_t)pool_threads(), c.num_pairs);
    int64_t blocks = divide_up(num_rows, most > MIN_BLOCK_ROWS ? most : MIN_BLOCK_ROWS);
    if (blocks < wanted) blocks = least(wanted, divide_up(num_rows, 2 * TILE));
    c.block_rows = divide_up(divide_up(num_rows, blocks), 2 * TILE) * 2 * TILE;
    c.num_blocks = (int32_t)divide_up(num_rows, c.block_rows);
    c.num_chunks = least(c.num_pairs, 8 * (int64_t)pool_threads()) * c.num_blocks;
    pool_run(c.num_chunks, multiply_pairs, &c);
}

EXPORT void octavo_linear(const matrix *m, const float *x, int64_t num_rows, int64_t x_stride,
                          const float *bias, float *out, int32_t is_prompt) {
    pthread_mutex_lock(&one_caller);
    (is_prompt ? multiply_prompt : multiply)(m, x, num_rows, x_stride, bias, out);
    pthread_mutex_unlock(&one_caller);
}
