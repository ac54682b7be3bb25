/* Prompts' attention on AMX. Rows are queries times the heads that share a KV head, in the order of
 * their positions. A span of keys and values at a time is brought into tiles, once for all rows of
 * an item; then 32 rows at a time are multiplied with its keys, turned into weights and multiplied
 * with its values, with an online softmax in float32.
 *
 * Spans begin at fixed positions, and what a row does not see of one adds zeros to its sums: so its
 * bits depend neither on where its item begins and ends nor on the other rows. */
#include "amx.h"

#if defined(HAS_TILES)
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define SPAN 256
#define SPAN_GROUPS (SPAN / GROUP)
#define MAX_ROWS (MAX_PROMPT_FLOATS / GROUP)
#define BLOCK_PART 8 /* keys that lie side by side in blocks of any size */

typedef struct {
    uint16_t rows[MAX_PROMPT_FLOATS];      /* [rows / TILE][groups][TILE][GROUP] */
    uint16_t keys[SPAN * MAX_HEAD_DIM];    /* [SPAN / TILE][groups][GROUP / 2][TILE][2] */
    uint16_t values[SPAN * MAX_HEAD_DIM];  /* [dims / TILE][SPAN_GROUPS][GROUP / 2][TILE][2] */
    uint16_t weights[SQUARE * SPAN];       /* [2][SPAN_GROUPS][TILE][GROUP] */
    float scores[SQUARE * SPAN];           /* [SQUARE][SPAN] */
    float sums[MAX_PROMPT_FLOATS];         /* [rows][dims]: of values times weights */
    float totals[MAX_ROWS * TILE];         /* [rows]: of weights, in TILE parts */
    float most[MAX_ROWS];                  /* of each row's scores */
} workspace;

/* An item, and the span at hand: its first key's position, and how many keys it has. */
typedef struct {
    const attention *a;
    const batch *b;
    const attention_item *item;
    workspace *w;
    int32_t group, num_rows, num_groups; /* heads per KV head; groups of a row */
    int32_t first, num_keys;
} work;

/* Memory of this thread's own; kept, as `scratch` is. */
static workspace *own_workspace(void) {
    static _Thread_local void *memory;
    if (!memory && posix_memalign(&memory, 64, sizeof(workspace))) abort();
    return memory;
}

INLINE __m512 load_8_and_8(const int type, const uint8_t *low, const uint8_t *high) {
    __m256i halves = _mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)low)),
        _mm_loadu_si128((const __m128i *)high), 1);
    if (type == FLOAT16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

/* Element i of the one beside element i of the other. */
INLINE __m512i pairs_as_bfloats(__m512 one, __m512 other) {
    const __m512i turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                           8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(turns, two_as_bfloats(one, other));
}

/* 2^x; 2^0 is 1 exactly, 2^-inf is 0. Within 3e-6 of itself. */
INLINE __m512 power_of_2(__m512 x) {
    __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 p = _mm512_set1_ps(0.013426686f);
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0.052242473f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0.241280213f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0.693044841f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, x);
}

/* Where a position lies in a cache of this type's blocks of one KV head. */
static const uint8_t *block_of(const work *k, const uint8_t *cache, int32_t position) {
    const batch *b = k->b;
    int64_t block = b->block_tables[k->item->seq * b->table_stride + position / b->block_size];
    int64_t size = (int64_t)b->block_size * k->a->head_dim * sizeof(uint16_t);
    return cache + (block * k->a->num_kv_heads + k->item->kv_head) * size;
}

/* Those of keys beyond the last are any. */
INLINE void narrow_keys(const int type, const work *k) {
    const int32_t head_dim = k->a->head_dim, block_size = k->b->block_size;
    const int64_t stride = block_size * (int64_t)sizeof(uint16_t);
    for (int32_t key = 0; key < k->num_keys; key += TILE) {
        const int32_t at = k->first + key, next = key + BLOCK_PART < k->num_keys ? at + BLOCK_PART : at;
        const uint8_t *low = block_of(k, k->a->k, at) + at % block_size * sizeof(uint16_t);
        const uint8_t *high = block_of(k, k->a->k, next) + next % block_size * sizeof(uint16_t);
        uint16_t *to = k->w->keys + key / TILE * k->num_groups * CELLS;
        for (int32_t d = 0; d < head_dim; d += 2, to += GROUP, low += 2 * stride, high += 2 * stride)
            _mm512_storeu_si512(to, pairs_as_bfloats(load_8_and_8(type, low, high),
                                                     load_8_and_8(type, low + stride, high + stride)));
        for (int32_t d = head_dim; d < k->num_groups * GROUP; d += 2, to += GROUP)
            _mm512_storeu_si512(to, _mm512_setzero_si512());
    }
}

/* Those beyond the last are 0, up to a whole group: nobody knows what lies there in the cache. */
INLINE void narrow_values(const int type, const work *k) {
    const int32_t head_dim = k->a->head_dim, block_size = k->b->block_size;
    for (int32_t key = 0; key < divide_up(k->num_keys, GROUP) * GROUP; key += 2) {
        const int32_t at = k->first + key;
        const __mmask16 one = key < k->num_keys ? 0xffff : 0;
        const __mmask16 other = key + 1 < k->num_keys ? 0xffff : 0;
        const uint8_t *from = one ? block_of(k, k->a->v, at) + at % block_size * head_dim * sizeof(uint16_t) : NULL;
        uint16_t *to = k->w->values + key / GROUP * CELLS + key % GROUP / 2 * GROUP;
        for (int32_t d = 0; d < head_dim; d += TILE, to += SPAN_GROUPS * CELLS) {
            __m512 x = _mm512_setzero_ps(), y = x;
            const uint8_t *p = from + d * sizeof(uint16_t), *q = p + head_dim * sizeof(uint16_t);
            if (one) x = load_8_and_8(type, p, p + 16);
            if (other) y = load_8_and_8(type, q, q + 16);
            _mm512_storeu_si512(to, pairs_as_bfloats(x, y));
        }
    }
}

/* Queries times `factor`. */
static void narrow_rows(const work *k, float factor) {
    const int32_t head_dim = k->a->head_dim;
    for (int32_t row = 0; row < k->num_rows; row++) {
        const int32_t head = k->item->kv_head * k->group + row % k->group;
        const float *from = k->a->query + head * head_dim +
                            (k->item->token + row / k->group) * k->a->query_stride;
        uint16_t *to = k->w->rows + row / TILE * k->num_groups * CELLS + row % TILE * GROUP;
        for (int32_t d = 0; d < head_dim; d += GROUP, to += CELLS) {
            const __mmask16 rest = d + TILE < head_dim ? 0xffff : 0;
            __m512 x = _mm512_loadu_ps(from + d), y = _mm512_maskz_loadu_ps(rest, from + d + TILE);
            _mm512_storeu_si512(to, two_as_bfloats(_mm512_mul_ps(x, _mm512_set1_ps(factor)),
                                                   _mm512_mul_ps(y, _mm512_set1_ps(factor))));
        }
    }
}

/* cap * tanh(x) / ln 2 */
INLINE __m512 capped(__m512 x, float cap) {
    const __m512 one = _mm512_set1_ps(1);
    __m512 e = power_of_2(_mm512_mul_ps(x, _mm512_set1_ps(-2 * (float)M_LOG2E)));
    __m512 tanh = _mm512_div_ps(_mm512_sub_ps(one, e), _mm512_add_ps(one, e));
    return _mm512_mul_ps(tanh, _mm512_set1_ps(cap * (float)M_LOG2E));
}

/* A row's scores of keys [from, to) of a span, of which it sees [hidden, visible): those that it
 * does not see become -inf. Gives the largest. */
INLINE float largest(float *scores, int32_t from, int32_t to, int32_t hidden, int32_t visible,
                     float softcap) {
    const __m512 never = _mm512_set1_ps(-INFINITY);
    __m512 top = never;
    if (softcap > 0)
        for (int32_t key = from; key < to; key += TILE)
            _mm512_storeu_ps(scores + key, capped(_mm512_loadu_ps(scores + key), softcap));
    if (hidden > from || visible < to)
        for (int32_t key = from; key < to; key += TILE) {
            const __m512i keys = _mm512_add_epi32(
                _mm512_set1_epi32(key),
                _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
            const __mmask16 seen = _mm512_cmplt_epi32_mask(keys, _mm512_set1_epi32(visible)) &
                                   _mm512_cmpge_epi32_mask(keys, _mm512_set1_epi32(hidden));
            _mm512_storeu_ps(scores + key, _mm512_mask_loadu_ps(never, seen, scores + key));
        }
    for (int32_t key = from; key < to; key += TILE) /* a score that is no number leaves it alone */
        top = _mm512_max_ps(_mm512_loadu_ps(scores + key), top);
    return _mm512_reduce_max_ps(top);
}

/* Scores less `base` become weights in tiles. Gives their sum, once rounded, in parts. */
INLINE __m512 soften(const float *scores, int32_t from, int32_t to, float base, uint16_t *weights) {
    const __m512i ones = _mm512_set1_epi16(0x3f80);
    __m512 sum = _mm512_setzero_ps();
    for (int32_t key = from; key < to; key += GROUP) {
        __m512 x = _mm512_sub_ps(_mm512_loadu_ps(scores + key), _mm512_set1_ps(base));
        __m512 y = _mm512_sub_ps(_mm512_loadu_ps(scores + key + TILE), _mm512_set1_ps(base));
        __m512i both = two_as_bfloats(power_of_2(x), power_of_2(y));
        _mm512_storeu_si512(weights + key / GROUP * CELLS, both);
        sum = _mm512_dpbf16_ps(sum, (__m512bh)both, (__m512bh)ones);
    }
    return sum;
}

/* Rows [row, row + num) with keys [from, to) of the span, whole groups. */
static void attend_square(const work *k, int32_t row, int32_t num, int32_t from, int32_t to) {
    workspace *w = k->w;
    const int32_t dims = k->num_groups * GROUP, window = k->a->window;
    const int64_t key_tiles = (int64_t)k->num_groups * CELLS;
    float most[SQUARE] = {0}, shrink[SQUARE], added[SQUARE * SQUARE] __attribute__((aligned(64)));
    for (int32_t key = from; key < to; key += GROUP)
        multiply_tiles(w->rows + row / TILE * key_tiles, w->keys + key / TILE * key_tiles,
                       k->num_groups, key_tiles, num, w->scores + key, SPAN);
    for (int32_t r = 0; r < num; r++) {
        int32_t visible = k->item->position + (row + r) / k->group + 1 - k->first;
        int32_t hidden = window ? visible - window : 0;
        most[r] = largest(w->scores + r * SPAN, from, to, hidden, visible, k->a->softcap);
    }
    for (int32_t r = 0; r < SQUARE; r += TILE) {
        __m512 before = _mm512_loadu_ps(w->most + row + r);
        __m512 now = _mm512_max_ps(before, _mm512_loadu_ps(most + r));
        _mm512_storeu_ps(w->most + row + r, now);
        now = _mm512_max_ps(now, _mm512_set1_ps(-FLT_MAX)); /* -inf less itself is no number */
        _mm512_storeu_ps(most + r, now);
        _mm512_storeu_ps(shrink + r, power_of_2(_mm512_sub_ps(before, now)));
    }
    for (int32_t r = 0; r < num; r++) {
        float *total = w->totals + (row + r) * TILE;
        uint16_t *weights = w->weights + r / TILE * SPAN_GROUPS * CELLS + r % TILE * GROUP;
        __m512 sum = soften(w->scores + r * SPAN, from, to, most[r], weights);
        _mm512_storeu_ps(total, _mm512_fmadd_ps(_mm512_loadu_ps(total), _mm512_set1_ps(shrink[r]), sum));
    }
    for (int32_t d = 0; d < dims; d += SQUARE) {
        const int32_t skip = from / GROUP * CELLS;
        multiply_tiles(w->weights + skip, w->values + d / TILE * SPAN_GROUPS * CELLS + skip,
                       (to - from) / GROUP, SPAN_GROUPS * CELLS, num, added, SQUARE);
        for (int32_t r = 0; r < num; r++)
            for (int32_t i = 0; i < SQUARE; i += TILE) {
                float *sums = w->sums + (row + r) * dims + d + i;
                _mm512_storeu_ps(sums, _mm512_fmadd_ps(_mm512_loadu_ps(sums), _mm512_set1_ps(shrink[r]),
                                                       _mm512_loadu_ps(added + r * SQUARE + i)));
            }
    }
}

static void attend_span(const work *k) {
    if (k->a->kv_type == FLOAT16) {
        narrow_keys(FLOAT16, k);
        narrow_values(FLOAT16, k);
    } else {
        narrow_keys(BFLOAT16, k);
        narrow_values(BFLOAT16, k);
    }
    for (int32_t row = 0; row < k->num_rows; row += SQUARE) {
        int32_t num = least(SQUARE, k->num_rows - row), position = k->item->position - k->first;
        int32_t to = least(position + (row + num - 1) / k->group + 1, k->num_keys);
        int32_t from = k->a->window ? position + row / k->group + 1 - k->a->window : 0;
        if (from < 0) from = 0;
        if (from < to)
            attend_square(k, row, num, from / GROUP * GROUP, (int32_t)divide_up(to, GROUP) * GROUP);
    }
}

static void finish_rows(const work *k) {
    const int32_t head_dim = k->a->head_dim, dims = k->num_groups * GROUP;
    for (int32_t row = 0; row < k->num_rows; row++) {
        int64_t token = k->item->token + row / k->group;
        int64_t head = token * k->a->num_heads + k->item->kv_head * k->group + row % k->group;
        float *out = k->a->output + head * head_dim;
        const float *sums = k->w->sums + row * dims;
        __m512 inverse = _mm512_set1_ps(
            1 / _mm512_reduce_add_ps(_mm512_loadu_ps(k->w->totals + row * TILE)));
        for (int32_t d = 0; d < head_dim; d += TILE) /* -0, which zeros added later would make 0, is 0 */
            _mm512_storeu_ps(out + d, _mm512_fmadd_ps(_mm512_loadu_ps(sums + d), inverse, _mm512_setzero_ps()));
    }
}

void attend_tiles(const attention *a, const batch *b, const attention_item *item) {
    work k = {.a = a, .b = b, .item = item, .w = own_workspace()};
    k.group = a->num_heads / a->num_kv_heads;
    k.num_rows = item->num_queries * k.group;
    k.num_groups = (int32_t)divide_up(a->head_dim, GROUP);
    narrow_rows(&k, (a->softcap > 0 ? 1 / a->softcap : (float)M_LOG2E) * a->scale);
    memset(k.w->sums, 0, sizeof(float) * k.num_rows * k.num_groups * GROUP);
    memset(k.w->totals, 0, sizeof(float) * k.num_rows * TILE);
    for (int32_t row = 0; row < divide_up(k.num_rows, SQUARE) * SQUARE; row++)
        k.w->most[row] = -INFINITY;
    const int32_t end = item->position + item->num_queries, low = item->position + 1 - a->window;
    configure_tiles();
    for (k.first = a->window && low > 0 ? low / SPAN * SPAN : 0; k.first < end; k.first += SPAN) {
        k.num_keys = least(SPAN, end - k.first);
        attend_span(&k);
    }
    _tile_release();
    finish_rows(&k);
}
TILES_END
#endif
