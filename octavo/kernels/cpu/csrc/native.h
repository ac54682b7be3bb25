/* What the translation units share: the matrix format, the thread pool and the table of functions
 * that each instruction set fills in.
 *
 * Matrices are 4 or 8 bits, in groups of GROUP inputs that share a scale (and, Q4_1, a minimum), as
 * GGUF's Q4_0, Q4_1 and Q8_0 have them; the numbers are those of the file, only their order differs.
 *
 * Packed order. `lanes` output rows form a panel, in which, group by group, lie
 *   4 bits: 4 vectors of 4*lanes bytes; byte 4*lane+j of vector v holds input 8v+j of the group in
 *           its low and input 8v+4+j in its high half;
 *   8 bits: 8 vectors of 4*lanes bytes; byte 4*lane+j of vector v holds input 4v+j;
 *   then `lanes` scales, and with Q4_1 as many minima, float16.
 * 8-bit values are stored with their sign bit flipped where `flip8` says so.
 *
 * Every function gives a row (a token) the same bits whatever rows it is computed with: sums run in
 * a fixed order per row, fused multiply-adds are written out, and the compiler may not contract. */
#ifndef OCTAVO_NATIVE_H
#define OCTAVO_NATIVE_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#define GROUP 32
/* Of the packed order above and of the rounding to 8 bits. Raise it when either changes: packed
 * weights are kept on disk. */
#define PACKING_VERSION 2
#define EXPORT __attribute__((visibility("default")))

enum { Q4_0 = 0, Q4_1 = 1, Q8_0 = 2 };
enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

typedef struct {
    uint8_t *packed;
    int32_t kind;
    int32_t in_features;
    int32_t out_features;
    int32_t num_groups; /* ceil(in_features / GROUP) */
} matrix;

/* Rows of activations in 8 bits: x[i] = scale[g] * q[i]. There is room for a multiple of CELL_ROWS
 * rows, which lie side by side: a kernel reads one stretch of memory for all of them. */
#define CELL_ROWS 8
#define FOURS (GROUP / 4)
typedef struct {
    int8_t *q;      /* [rows / CELL_ROWS][num_groups][FOURS][CELL_ROWS][4] */
    float *scale;   /* [rows / CELL_ROWS][num_groups][CELL_ROWS] */
    int32_t *offset; /* the same: what sums of products begin with, -zero * sum of q */
    float *xsum;    /* the same: scale * sum of q */
    int32_t num_groups, kind; /* as the matrix has them */
    int32_t zero; /* how much higher than their values the matrix's quants lie, as kernels read them */
} activations;

/* A tile holds TILE rows of GROUP bfloat16s. Activations in tiles: [rows / TILE][num_groups][TILE]
 * [GROUP]; rows that are nobody's are 0. */
#define TILE 16

enum { ACT_SILU = 0, ACT_GELU = 1, ACT_GELU_TANH = 2 };

typedef struct {
    const float *query; /* token stride query_stride, head stride head_dim */
    int64_t query_stride;
    float *output; /* [num_tokens][num_heads][head_dim] */
    uint8_t *k; /* [num_blocks][num_kv_heads][head_dim][block_size]: scores are sums of vectors */
    uint8_t *v; /* [num_blocks][num_kv_heads][block_size][head_dim] */
    int32_t num_heads, num_kv_heads, head_dim;
    int32_t window; /* 0: none */
    float scale, softcap; /* softcap 0: none */
    int32_t kv_type;
} attention;

/* A step's sequences: i has query_lens[i] queries, the last of its seq_lens[i] positions; tokens lie
 * sequence after sequence. */
typedef struct {
    const int64_t *slots; /* [num_tokens]: where a token's key and value go */
    const int32_t *query_lens, *seq_lens;
    const int32_t *block_tables;
    int64_t table_stride, num_tokens;
    int32_t num_seqs, block_size;
    const int64_t *queries; /* [num_seqs], ascending: the tokens that attend, one per sequence, where
                               those are not all */
    const int64_t *role_ends; /* [num_roles], ascending, up to the number of rows that come out of
                                 attention: rows below the first were generated, then those below
                                 the second are of prompts, and so on in turns */
    int32_t num_roles;
} batch;

/* Some queries of one sequence for some KV heads, over keys of segments [first, last). */
typedef struct {
    int32_t seq;
    int32_t kv_head, num_kv_heads; /* the first one, and how many */
    int32_t token;    /* of the step, the first query's */
    int32_t position; /* in the sequence, the first query's */
    int32_t num_queries;
    int32_t in_tiles; /* all of a prompt, on AMX: one KV head, and what follows is not used */
    int32_t first_segment, last_segment;
    float *partial; /* NULL: write the output; else of each row [head_dim + 2] */
} attention_item;

/* Keys of one segment are summed up on their own and segments merged in order, so that the work on
 * a long sequence can be divided without changing a bit of the result. */
#define SEGMENT 512
#define MAX_TILE_FLOATS 4096 /* rows (queries times heads) of an item times head_dim */
#define MAX_TILE_ROWS 64
#define MAX_HEAD_DIM 256
#define MAX_PROMPT_FLOATS 32768 /* the same in tiles, with head_dim rounded up to GROUP */

/* How a row's token is chosen; see kernels/sampling.py. */
typedef struct {
    float temperature, top_p, min_p;
    float number; /* in [0, 1) */
    int64_t top_k;
} choice;

#define STRIP 64 /* logits that are looked at together */

typedef struct {
    const char *name;
    int32_t lanes;
    uint8_t flip8;
    void (*quantize)(const float *x, int32_t in_features, activations *to, int64_t row);
    void (*to_q8_0)(const uint8_t *x, int32_t type, int64_t size, uint8_t *blocks);
    void (*narrow)(const float *x, int32_t type, int64_t size, uint8_t *to);
    void (*linear)(const matrix *m, const activations *x, int64_t row_begin, int64_t row_end,
                   const float *bias, float *out, int64_t out_stride, int32_t panel_begin,
                   int32_t panel_end);
    void (*rms_norm)(const float *x, float *residual, const float *weight, float *out, int64_t size,
                     float eps, int32_t add_one);
    void (*rotate)(float *x, const float *cos, const float *sin, int64_t rot_dim);
    void (*gate)(const float *gate, const float *up, float *out, int64_t size, int32_t act);
    void (*attend)(const attention *a, const batch *b, const attention_item *item);
    void (*merge)(const float *partials, int32_t num, int64_t stride, int32_t head_dim, float *out);
    int64_t (*argmax)(const float *x, int64_t size);
    int64_t (*draw)(const float *x, int64_t size, const choice *c, float *work);
    int64_t (*rate)(const float *x, int64_t size, int32_t num_top, int64_t *ids, float *logprobs,
                    float *work);
    /* Rows of prompts, at most TILE at once, to tiles, and pairs of panels of 16 times these; NULL
     * where there are none. */
    void (*narrow_tile_rows)(const float *x, int64_t x_stride, int32_t num_rows,
                             int32_t in_features, uint16_t *to);
    void (*linear_tiles)(const matrix *m, const uint16_t *tiles, int64_t row_begin,
                         int64_t row_end, const float *bias, float *out, int64_t out_stride,
                         int32_t pair_begin, int32_t pair_end);
    /* Queries of a prompt, of one KV head, over a cache of 16 bits; NULL where there are no tiles. */
    void (*attend_tiles)(const attention *a, const batch *b, const attention_item *item);
} isa;

extern const isa isa_generic, isa_avx2, isa_avx512, isa_neon;
/* NULL if this CPU, its system or the compiler lacks the instructions beyond AVX-512, AVX2. */
const isa *find_amx(void), *find_avxvnni(void);
void attend_tiles(const attention *a, const batch *b, const attention_item *item); /* of "amx" */
extern const isa *active; /* set once, by dispatch.c */

/* ---- pool.c */
typedef void (*task)(void *context, int32_t chunk);
void pool_run(int32_t num_chunks, task run, void *context);
int32_t pool_threads(void);
void pool_resize(int32_t num_threads);

void *scratch(size_t num_bytes); /* rows.c: for one exported function at a time */

/* ---- rows.c */
int32_t row_chunks(int64_t num_rows, int64_t row_cost);
/* out = norm(x + residual); residual, where there is one, becomes x + residual. */
void norm_all(const float *x, int64_t x_stride, float *residual, const float *weight, float *out,
              int64_t num_rows, int64_t size, float eps, int32_t add_one);
void rotate_all(float *x, int64_t num_tokens, int64_t token_stride, int32_t num_heads,
                int64_t head_stride, const float *cos, const float *sin, int64_t rot_dim);
void gate_all(const float *gate_up, int64_t stride, float *out, int64_t num_rows, int64_t size,
              int32_t act);

/* ---- attention.c: write the step's keys and values into the cache, then attend causally. */
void attend_batch(const attention *a, const batch *b, const float *key, int64_t key_stride,
                  const float *value, int64_t value_stride);

/* ---- linear.c: out = x @ m.T + bias. x: [num_rows][in_features] float32, rows x_stride apart;
 * out: [num_rows][out_features] float32. */
void multiply(const matrix *m, const float *x, int64_t num_rows, int64_t x_stride,
              const float *bias, float *out);
void multiply_prompt(const matrix *m, const float *x, int64_t num_rows, int64_t x_stride,
                     const float *bias, float *out);

/* Of `lanes` outputs' groups, as they are packed: quants, then scales, then Q4_1's least values. */
static inline size_t group_bytes(int32_t kind, int32_t lanes) {
    return (size_t)lanes * (kind == Q8_0 ? 34 : kind == Q4_1 ? 20 : 18);
}

static inline int64_t width_of(int32_t type) { return type == FLOAT32 ? 4 : 2; }
static inline int32_t least(int64_t a, int64_t b) { return (int32_t)(a < b ? a : b); }
static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Where the scale and sums of group 0 of a row lie; those of the next group lie CELL_ROWS further. */
static inline int64_t cell_of(const activations *x, int64_t row) {
    return row / CELL_ROWS * CELL_ROWS * x->num_groups + row % CELL_ROWS;
}

/* Inputs 4 * v to 4 * v + 3 of a group, whose inputs 0 to 3 of the first row lie at q, in row r. */
#define FOUR(q, v, r) ((q) + ((v) * CELL_ROWS + (r)) * 4)

static inline int64_t first_four(const activations *x, int64_t row) {
    return row / CELL_ROWS * CELL_ROWS * x->num_groups * GROUP + row % CELL_ROWS * 4;
}

#define ROWS_OF(chunk, num_rows, num_chunks)                      \
    int64_t begin = (num_rows) * (int64_t)(chunk) / (num_chunks), \
            end = (num_rows) * (int64_t)((chunk) + 1) / (num_chunks)

extern pthread_mutex_t one_caller; /* held by every exported function that uses the pool */

float half_to_float(uint16_t h);
uint16_t float_to_half(float f);

#endif
