/* Prompts on AMX: weights are widened to bfloat16 once for a block of rows, and all of a row's sums
 * stay in tiles from its first input to its last. A tile product gives each of its rows the same
 * bits whatever the others are. */
#include "amx.h"

#if defined(HAS_TILES)
#include <cpuid.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static void narrow_tile_rows(const float *x, int64_t x_stride, int32_t num_rows,
                             int32_t in_features, uint16_t *to) {
    for (int32_t row = 0; row < TILE; row++, to += GROUP) {
        for (int32_t i = 0; i < in_features; i += GROUP) {
            float tail[GROUP] = {0};
            const float *from = x + row * x_stride + i;
            if (row >= num_rows)
                from = tail;
            else if (in_features - i < GROUP)
                from = memcpy(tail, from, (size_t)(in_features - i) * sizeof(float));
            __m512i both = two_as_bfloats(_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16));
            _mm512_storeu_si512(to + i / GROUP * CELLS, both);
        }
    }
}

/* A group of a panel becomes a tile whose row i holds inputs 2i and 2i + 1 of output 0, of output
 * 1, ... So that nothing has to be shuffled after rounding, vectors hold neighbours from the start:
 * inputs 2i and 2i + 1 of 8 outputs each. */
typedef struct {
    __m512 low, high; /* of outputs 0 to 7, of 8 to 15; each twice */
} per_output;

INLINE per_output load_twice(const uint8_t *halves) {
    const __m512i low = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    __m512 all = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)halves));
    return (per_output){_mm512_permutexvar_ps(low, all), _mm512_permutexvar_ps(high, all)};
}

/* The 4 or 8 bits from bit `bit` of each even lane, and from `bit + 8` of each odd one. */
INLINE __m512 quants(const int kind, __m512i bytes, const int bit) {
    const __m512i shift = _mm512_set1_epi64(bit | (int64_t)(bit + 8) << 32);
    if (kind == Q8_0) {
        __m512i on_top = _mm512_sllv_epi32(bytes, _mm512_sub_epi32(_mm512_set1_epi32(24), shift));
        return _mm512_cvtepi32_ps(_mm512_srai_epi32(on_top, 24));
    }
    const __m512 from_0 = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512 table = kind == Q4_0 ? _mm512_sub_ps(from_0, _mm512_set1_ps(8)) : from_0;
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(bytes, shift), table);
}

INLINE void widen_panel(const int kind, const uint8_t *panel, int32_t num_groups, uint16_t *to) {
    const __m512i low = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const int num_vectors = kind == Q8_0 ? 8 : 4, pairs = TILE / num_vectors;
    for (int32_t g = 0; g < num_groups; g++) {
        const uint8_t *scales = panel + num_vectors * 64;
        const per_output scale = load_twice(scales);
        const per_output least = kind == Q4_1 ? load_twice(scales + 32) : (per_output){};
#pragma GCC unroll 8
        for (int v = 0; v < num_vectors; v++, panel += 64) {
            __m512i bytes = _mm512_loadu_si512(panel);
            if (kind == Q8_0) bytes = _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)); /* flip8 */
            __m512i own = _mm512_permutexvar_epi32(low, bytes);
            __m512i others = _mm512_permutexvar_epi32(high, bytes);
#pragma GCC unroll 4
            for (int pair = 0; pair < pairs; pair++, to += GROUP) {
                const int bit = pair % 2 * 16 + pair / 2 * 4;
                __m512 x = quants(kind, own, bit), y = quants(kind, others, bit);
                if (kind == Q4_1) {
                    x = _mm512_fmadd_ps(x, scale.low, least.low);
                    y = _mm512_fmadd_ps(y, scale.high, least.high);
                } else {
                    x = _mm512_mul_ps(x, scale.low);
                    y = _mm512_mul_ps(y, scale.high);
                }
                _mm512_storeu_si512(to, two_as_bfloats(x, y));
            }
        }
        panel = scales + (kind == Q4_1 ? 64 : 32);
    }
}

static void widen(const matrix *m, int32_t panel, uint16_t *to) {
    const uint8_t *from =
        m->packed + (size_t)panel * m->num_groups * group_bytes(m->kind, TILE);
    if (m->kind == Q8_0)
        widen_panel(Q8_0, from, m->num_groups, to);
    else if (m->kind == Q4_1)
        widen_panel(Q4_1, from, m->num_groups, to);
    else
        widen_panel(Q4_0, from, m->num_groups, to);
}

/* Those of a square's sums that are somebody's, with the bias, to where they belong. */
static void put(const float *square, const float *bias, float *out, int64_t out_stride,
                int64_t num_rows, int32_t num_outputs) {
    for (int32_t half = 0; half < SQUARE && half < num_outputs; half += TILE) {
        const __mmask16 mask = (__mmask16)((1u << least(num_outputs - half, TILE)) - 1);
        const __m512 add = bias ? _mm512_maskz_loadu_ps(mask, bias + half) : _mm512_setzero_ps();
        for (int64_t row = 0; row < num_rows; row++) {
            __m512 sum = _mm512_loadu_ps(square + row * SQUARE + half);
            if (bias) sum = _mm512_add_ps(sum, add); /* else -0 would become 0 */
            _mm512_mask_storeu_ps(out + row * out_stride + half, mask, sum);
        }
    }
}

/* Memory of this thread's own; kept, as `scratch` is. */
static uint16_t *weight_tiles(size_t num_bytes) {
    static _Thread_local void *memory;
    static _Thread_local size_t size;
    if (num_bytes > size) {
        free(memory);
        size = num_bytes;
        if (posix_memalign(&memory, 64, size)) abort();
    }
    return memory;
}

static void multiply_pair(const matrix *m, const uint16_t *tiles, int64_t row_begin,
                          int64_t row_end, const float *bias, float *out, int64_t out_stride,
                          int32_t pair) {
    const int64_t next = (int64_t)m->num_groups * CELLS;
    const int32_t column = pair * SQUARE, num_outputs = m->out_features - column;
    uint16_t *weights = weight_tiles(2 * next * sizeof(uint16_t));
    widen(m, 2 * pair, weights);
    if (num_outputs > TILE) widen(m, 2 * pair + 1, weights + next); /* else they are any */
    out += column;
    for (int64_t row = row_begin; row < row_end; row += SQUARE) {
        float square[SQUARE * SQUARE] __attribute__((aligned(64)));
        const uint16_t *rows = tiles + row / TILE * next;
        const int64_t num_rows = least(row_end - row, SQUARE);
        const int is_whole = !bias && num_rows == SQUARE && num_outputs >= SQUARE;
        float *to = is_whole ? out + row * out_stride : square;
        multiply_tiles(rows, weights, m->num_groups, next, 1, num_rows, to,
                       is_whole ? out_stride : SQUARE);
        if (!is_whole)
            put(square, bias ? bias + column : NULL, out + row * out_stride, out_stride, num_rows,
                num_outputs);
    }
}

static void linear_tiles(const matrix *m, const uint16_t *tiles, int64_t row_begin, int64_t row_end,
                         const float *bias, float *out, int64_t out_stride, int32_t pair_begin,
                         int32_t pair_end) {
    configure_tiles();
    for (int32_t pair = pair_begin; pair < pair_end; pair++)
        multiply_pair(m, tiles, row_begin, row_end, bias, out, out_stride, pair);
    _tile_release();
}
TILES_END

#define REQUEST_PERMISSION 0x1023 /* ARCH_REQ_XCOMP_PERM */
#define TILE_DATA 18              /* XFEATURE_XTILEDATA */

/* The kernel gives tiles to processes that ask for them, if no signal stack is too small. */
static int has_tiles(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 22 & d >> 24 & 1) == 0) return 0;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a >> 5 & 1) == 0) return 0;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

/* AVX-512, and tiles for prompts; NULL if there are none. */
const isa *find_amx(void) {
    static isa found;
    if (!has_tiles()) return NULL;
    found = isa_avx512;
    found.name = "amx";
    found.narrow_tile_rows = narrow_tile_rows;
    found.linear_tiles = linear_tiles;
    found.attend_tiles = attend_tiles;
    return &found;
}
#else
const isa *find_amx(void) { return NULL; }
#endif
