/* Prompts' attention on AMX. Rows are queries times the heads that share a KV head, in the order of
 * their positions. A span of keys and values at a time is brought into tiles, once for all rows of
 * an item; then 32 rows at a time are multiplied with its keys, turned into weights and multiplied
 * with its values, with an online softmax in float32.
 *
 * Spans begin at fixed positions, and what a row does not see of one adds zeros to its sums: so its
 * bits depend neither on where its item begins and ends nor on the other rows. Zero times infinity
 * would be none: values that are not finite count as 0, and rows that see them are no numbers. */
#include "amx.h"

#if defined(HAS_TILES)
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define SPAN 256 /* keys */
#define SPAN_GROUPS (SPAN / GROUP)
#define MAX_ROWS (MAX_PROMPT_FLOATS / GROUP)
#define WIDTH ((int64_t)sizeof(uint16_t)) /* of the cache's numbers */

/* Where nothing belongs, beyond the last row, key and dimension, anything may lie, but for values of
 * no keys: it ends in rows, columns and dimensions of products that nobody reads. */
typedef struct {
    uint16_t rows[MAX_PROMPT_FLOATS];     /* [rows / TILE][groups][TILE][GROUP] */
    uint16_t keys[SPAN * MAX_HEAD_DIM];   /* [SPAN / TILE][groups][GROUP / 2][TILE][2] */
    uint16_t values[SPAN * MAX_HEAD_DIM]; /* [dims / TILE][SPAN_GROUPS][GROUP / 2][TILE][2] */
    uint16_t weights[SQUARE * SPAN];      /* [2][SPAN_GROUPS][TILE][GROUP] */
    float scores[SQUARE * SPAN];          /* [SQUARE][SPAN] */
    float sums[MAX_PROMPT_FLOATS];        /* [rows][dims]: of values times weights */
    float totals[MAX_ROWS * TILE];        /* [rows]: of weights, in TILE parts */
    float most[MAX_ROWS];                 /* of each row's scores */
    int32_t odd[SPAN], num_odd;           /* keys of the span whose values are not all finite */
} workspace;

/* An item, and the span at hand: its first key's position, and how many keys it has. */
typedef struct {
    const attention *a;
    const batch *b;
    const attention_item *item;
    workspace *w;
    int32_t heads, num_rows; /* heads that share the KV head */
    int32_t groups, dims;    /* head_dim in whole groups */
    int32_t first, num_keys;
} work;

/* Memory of this thread's own; kept, as `scratch` is. */
static workspace *own_workspace(void) {
    static _Thread_local void *memory;
    if (!memory && posix_memalign(&memory, 64, sizeof(workspace))) abort();
    return memory;
}

INLINE __m512 load_8_and_8(const int type, const uint8_t *low, const uint8_t *high) {
    const __m128i first = _mm_loadu_si128((const __m128i *)low);
    const __m128i second = _mm_loadu_si128((const __m128i *)high);
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
    if (type == FLOAT16) return _mm512_cvtph_ps(both);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(both), 16));
}

/* Each element of the one beside its counterpart. */
INLINE __m512i pairs_as_bfloats(__m512 one, __m512 other) {
    const __m512i turns =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(turns, two_as_bfloats(one, other));
}

/* 2^x to 3e-6 of it, 2^0 exactly; 0 below 2^-126: smaller floats are slow. */
INLINE __m512 power_of_2(__m512 x) {
    const __mmask16 some = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126), _CMP_NLT_UQ);
    __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 p = _mm512_set1_ps(0.013426686f);
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0.052242473f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0.241280213f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0.693044841f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(some, p, x);
}

/* cap * tanh(x / 2 * ln 2) / ln 2 */
INLINE __m512 capped(__m512 x, float cap) {
    const __m512 one = _mm512_set1_ps(1), sign = _mm512_and_ps(x, _mm512_set1_ps(-0.0f));
    __m512 e = power_of_2(_mm512_or_ps(x, _mm512_set1_ps(-0.0f)));
    __m512 tanh = _mm512_div_ps(_mm512_sub_ps(one, e), _mm512_add_ps(one, e));
    return _mm512_mul_ps(_mm512_or_ps(tanh, sign), _mm512_set1_ps(cap * (float)M_LOG2E));
}

/* Queries, times what makes their scores exponents of 2, or what `capped` takes. */
static void narrow_rows(const work *k) {
    const attention *a = k->a;
    const float log = a->softcap > 0 ? 2 * (float)M_LOG2E / a->softcap : (float)M_LOG2E;
    const __m512 factor = _mm512_set1_ps(a->scale * log);
    for (int32_t row = 0; row < k->num_rows; row++) {
        const int64_t token = k->item->token + row / k->heads;
        const int32_t head = k->item->kv_head * k->heads + row % k->heads;
        const float *from = a->query + token * a->query_stride + head * a->head_dim;
        uint16_t *to = k->w->rows + row / TILE * k->dims * TILE + row % TILE * GROUP;
        for (int32_t d = 0; d < a->head_dim; d += GROUP, to += CELLS) {
            const __mmask16 rest = d + TILE < a->head_dim ? 0xffff : 0;
            __m512 x = _mm512_mul_ps(_mm512_loadu_ps(from + d), factor);
            __m512 y = _mm512_mul_ps(_mm512_maskz_loadu_ps(rest, from + d + TILE), factor);
            _mm512_storeu_si512(to, two_as_bfloats(x, y));
        }
    }
}

/* The block of one KV head in which a position lies. */
static const uint8_t *block_of(const work *k, const uint8_t *cache, int32_t position) {
    const int32_t *table = k->b->block_tables + k->item->seq * k->b->table_stride;
    const int64_t size = k->b->block_size * k->a->head_dim * WIDTH;
    const int64_t block = table[position / k->b->block_size];
    return cache + (block * k->a->num_kv_heads + k->item->kv_head) * size;
}

/* 8 keys lie side by side in blocks of any size. Those beyond the last are any. */
INLINE void narrow_keys(const int type, const work *k) {
    const int32_t block_size = k->b->block_size;
    const int64_t stride = block_size * WIDTH;
    for (int32_t key = 0; key < k->num_keys; key += TILE) {
        const int32_t at = k->first + key, next = key + 8 < k->num_keys ? at + 8 : at;
        const uint8_t *low = block_of(k, k->a->k, at) + at % block_size * WIDTH;
        const uint8_t *high = block_of(k, k->a->k, next) + next % block_size * WIDTH;
        uint16_t *to = k->w->keys + key * k->dims;
        for (int32_t d = 0; d < k->dims; d += 2, to += GROUP) {
            __m512i pairs = _mm512_setzero_si512();
            if (d < k->a->head_dim)
                pairs = pairs_as_bfloats(
                    load_8_and_8(type, low + d * stride, high + d * stride),
                    load_8_and_8(type, low + (d + 1) * stride, high + (d + 1) * stride));
            _mm512_storeu_si512(to, pairs);
        }
    }
}

/* 16 values, 0 for what is not finite; sets `odd` if anything is not. */
INLINE __m512 load_finite(const int type, const uint8_t *from, __mmask16 *odd) {
    __m512 x = load_8_and_8(type, from, from + 8 * WIDTH);
    const __mmask16 not_finite = _mm512_fpclass_ps_mask(x, 0x99); /* both NaNs, both infinities */
    *odd |= not_finite;
    return _mm512_maskz_mov_ps((__mmask16)~not_finite, x);
}

/* Beyond the last there are zeros, up to a whole group: nobody knows what lies there in the cache. */
INLINE void narrow_values(const int type, const work *k) {
    const int32_t head_dim = k->a->head_dim, block_size = k->b->block_size;
    const int64_t row_bytes = head_dim * WIDTH;
    k->w->num_odd = 0;
    for (int32_t key = 0; key < divide_up(k->num_keys, GROUP) * GROUP; key += 2) {
        const int32_t at = k->first + least(key, k->num_keys - 1);
        const uint8_t *one = block_of(k, k->a->v, at) + at % block_size * row_bytes;
        const uint8_t *other = one + row_bytes;
        uint16_t *to = k->w->values + key / GROUP * CELLS + key % GROUP / 2 * GROUP;
        __mmask16 one_odd = 0, other_odd = 0;
        for (int32_t d = 0; d < head_dim; d += TILE, to += SPAN_GROUPS * CELLS) {
            __m512 x = _mm512_setzero_ps(), y = x;
            if (key < k->num_keys) x = load_finite(type, one + d * WIDTH, &one_odd);
            if (key + 1 < k->num_keys) y = load_finite(type, other + d * WIDTH, &other_odd);
            _mm512_storeu_si512(to, pairs_as_bfloats(x, y));
        }
        if (one_odd) k->w->odd[k->w->num_odd++] = key;
        if (other_odd) k->w->odd[k->w->num_odd++] = key + 1;
    }
}

/* Scores of keys outside [hidden, visible) become -inf. */
INLINE void hide(float *scores, int32_t from, int32_t to, int32_t hidden, int32_t visible) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (int32_t key = from; key < to; key += TILE) {
        const __m512i keys = _mm512_add_epi32(_mm512_set1_epi32(key), lanes);
        const __mmask16 seen = _mm512_cmplt_epi32_mask(keys, _mm512_set1_epi32(visible)) &
                               _mm512_cmpge_epi32_mask(keys, _mm512_set1_epi32(hidden));
        const __m512 never = _mm512_set1_ps(-INFINITY);
        _mm512_storeu_ps(scores + key, _mm512_mask_loadu_ps(never, seen, scores + key));
    }
}

/* Less `base`, scores become weights in tiles. Gives the sum of these as they are there, in parts. */
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

/* Scores of rows [row, row + num) and of keys [from, to) of the span; gives the largest of each. */
static void score_square(const work *k, int32_t row, int32_t num, int32_t from, int32_t to,
                         float *largest) {
    const int32_t window = k->a->window, position = k->item->position - k->first;
    for (int32_t key = from; key < to; key += SQUARE)
        multiply_tiles(k->w->rows + row * k->dims, k->w->keys + key * k->dims, k->groups,
                       TILE * k->dims, 0, num, k->w->scores + key, SPAN);
    for (int32_t r = 0; r < num; r++) {
        float *scores = k->w->scores + r * SPAN;
        const int32_t visible = position + (row + r) / k->heads + 1;
        const int32_t hidden = window ? visible - window : 0;
        __m512 top = _mm512_set1_ps(-INFINITY);
        for (int32_t key = from; k->a->softcap > 0 && key < to; key += TILE)
            _mm512_storeu_ps(scores + key, capped(_mm512_loadu_ps(scores + key), k->a->softcap));
        if (hidden > from || visible < to) hide(scores, from, to, hidden, visible);
        for (int32_t key = from; key < to; key += TILE) /* passes over what is no number */
            top = _mm512_max_ps(_mm512_loadu_ps(scores + key), top);
        largest[r] = _mm512_reduce_max_ps(top);
    }
}

/* Add the span's weighted values, of keys [from, to), to those before it, times `shrink`. */
static void add_square(const work *k, int32_t row, int32_t num, int32_t from, int32_t to,
                       const float *shrink) {
    float added[SQUARE * SQUARE] __attribute__((aligned(64)));
    for (int32_t d = 0; d < k->dims; d += SQUARE) {
        multiply_tiles(k->w->weights + from * TILE, k->w->values + d * SPAN + from * TILE,
                       (to - from) / GROUP, SPAN * TILE, 0, num, added, SQUARE);
        for (int32_t r = 0; r < num; r++)
            for (int32_t i = 0; i < SQUARE; i += TILE) {
                float *sums = k->w->sums + (row + r) * k->dims + d + i;
                __m512 before = _mm512_loadu_ps(sums);
                __m512 more = _mm512_loadu_ps(added + r * SQUARE + i);
                _mm512_storeu_ps(sums, _mm512_fmadd_ps(before, _mm512_set1_ps(shrink[r]), more));
            }
    }
}

/* Rows [row, row + num), at most 32, and keys [from, to) of the span, whole groups. */
static void attend_square(const work *k, int32_t row, int32_t num, int32_t from, int32_t to) {
    float base[SQUARE] = {0}, shrink[SQUARE];
    score_square(k, row, num, from, to, base);
    for (int32_t r = 0; r < SQUARE; r += TILE) {
        float *most = k->w->most + row + r;
        __m512 before = _mm512_loadu_ps(most), now = _mm512_loadu_ps(base + r);
        now = _mm512_max_ps(before, now);
        _mm512_storeu_ps(most, now);
        now = _mm512_max_ps(now, _mm512_set1_ps(-FLT_MAX)); /* -inf less itself is no number */
        _mm512_storeu_ps(base + r, now);
        _mm512_storeu_ps(shrink + r, power_of_2(_mm512_sub_ps(before, now)));
    }
    for (int32_t r = 0; r < num; r++) {
        float *totals = k->w->totals + (row + r) * TILE;
        uint16_t *weights = k->w->weights + r / TILE * SPAN * TILE + r % TILE * GROUP;
        __m512 sum = soften(k->w->scores + r * SPAN, from, to, base[r], weights);
        sum = _mm512_fmadd_ps(_mm512_loadu_ps(totals), _mm512_set1_ps(shrink[r]), sum);
        _mm512_storeu_ps(totals, sum);
    }
    add_square(k, row, num, from, to, shrink);
}

/* Those that see a value that is not finite. */
static void spoil_rows(const work *k) {
    const int32_t position = k->item->position - k->first, window = k->a->window;
    for (int32_t row = 0; row < k->num_rows; row++) {
        const int32_t last = position + row / k->heads;
        for (int32_t i = 0; i < k->w->num_odd; i++)
            if (k->w->odd[i] <= last && (!window || k->w->odd[i] > last - window))
                k->w->totals[row * TILE] = NAN;
    }
}

static void attend_span(const work *k) {
    const int32_t position = k->item->position - k->first, window = k->a->window;
    if (k->a->kv_type == FLOAT16) {
        narrow_keys(FLOAT16, k);
        narrow_values(FLOAT16, k);
    } else {
        narrow_keys(BFLOAT16, k);
        narrow_values(BFLOAT16, k);
    }
    for (int32_t row = 0; row < k->num_rows; row += SQUARE) {
        const int32_t num = least(SQUARE, k->num_rows - row);
        int32_t to = least(position + (row + num - 1) / k->heads + 1, k->num_keys);
        int32_t from = window ? position + row / k->heads + 1 - window : 0;
        if (from < 0) from = 0;
        to = (int32_t)divide_up(to, GROUP) * GROUP;
        if (from < to) attend_square(k, row, num, from / GROUP * GROUP, to);
    }
    spoil_rows(k);
}

static void finish_rows(const work *k) {
    const attention *a = k->a;
    for (int32_t row = 0; row < k->num_rows; row++) {
        const int64_t token = k->item->token + row / k->heads;
        const int64_t head = token * a->num_heads + k->item->kv_head * k->heads + row % k->heads;
        const float total = _mm512_reduce_add_ps(_mm512_loadu_ps(k->w->totals + row * TILE));
        const __m512 part = _mm512_set1_ps(1 / total), zero = _mm512_setzero_ps();
        for (int32_t d = 0; d < a->head_dim; d += TILE) {
            /* + 0: whether -0 has become 0 depends on how many zeros were added to it. */
            __m512 sum = _mm512_loadu_ps(k->w->sums + row * k->dims + d);
            _mm512_storeu_ps(a->output + head * a->head_dim + d, _mm512_fmadd_ps(sum, part, zero));
        }
    }
}

void attend_tiles(const attention *a, const batch *b, const attention_item *item) {
    work k = {.a = a, .b = b, .item = item, .w = own_workspace()};
    k.heads = a->num_heads / a->num_kv_heads;
    k.num_rows = item->num_queries * k.heads;
    k.groups = (int32_t)divide_up(a->head_dim, GROUP);
    k.dims = k.groups * GROUP;
    narrow_rows(&k);
    memset(k.w->sums, 0, sizeof(float) * k.num_rows * k.dims);
    memset(k.w->totals, 0, sizeof(float) * k.num_rows * TILE);
    for (int32_t row = 0; row < k.num_rows + SQUARE && row < MAX_ROWS; row++)
        k.w->most[row] = -INFINITY;
    const int32_t end = item->position + item->num_queries;
    const int32_t low = item->position + 1 - a->window;
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
