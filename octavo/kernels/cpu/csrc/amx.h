/* What kernels on AMX tiles share. HAS_TILES says whether the compiler knows them; a file that
 * includes this puts TILES_END after them. */
#include "native.h"

#if defined(__x86_64__) && defined(__linux__) && !defined(OLD_ASSEMBLER) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define HAS_TILES
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c," \
                          "amx-tile,amx-bf16"))), \
    apply_to = function)
#define TILES_END _Pragma("clang attribute pop")
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")
#define TILES_END
#endif
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))
#define CELLS (TILE * GROUP) /* bfloat16s of a tile */
#define STRIDE (GROUP * sizeof(uint16_t))
#define SQUARE (2 * TILE) /* rows and outputs whose sums fill four tiles */

INLINE __m512i two_as_bfloats(__m512 first, __m512 second) {
    return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

/* Until tiles are released: or every switch of threads saves 8 KB. */
INLINE void configure_tiles(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int t = 0; t < 8; t++) config.row_bytes[t] = STRIDE, config.rows[t] = TILE;
    /* GCC 11 and 12 take it that only the first 8 bytes are read. */
    __asm__ volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
}

/* 32 rows of 32 outputs, to rows that lie `out_bytes` apart. Those of the second tiles, and their
 * weights, lie `next` after those of the first; where rows are `far`, those to come are fetched
 * ahead. Tile loads cost as much as products, so each is used twice. */
INLINE void multiply_square(const uint16_t *rows, const uint16_t *weights, int32_t num_groups,
                            int64_t next, const int far, float *out, int64_t out_bytes) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int32_t g = 0; g < num_groups; g++, rows += CELLS, weights += CELLS) {
#pragma GCC unroll 16
        for (int line = 0; far && line < TILE; line++) {
            _mm_prefetch((const char *)(rows + CELLS + line * GROUP), _MM_HINT_T0);
            _mm_prefetch((const char *)(rows + next + CELLS + line * GROUP), _MM_HINT_T0);
        }
        _tile_loadd(4, rows, STRIDE);
        _tile_loadd(5, rows + next, STRIDE);
        _tile_loadd(6, weights, STRIDE);
        _tile_loadd(7, weights + next, STRIDE);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    float *lower = (float *)((char *)out + TILE * out_bytes);
    _tile_stored(0, out, out_bytes);
    _tile_stored(1, out + TILE, out_bytes);
    _tile_stored(2, lower, out_bytes);
    _tile_stored(3, lower + TILE, out_bytes);
}

/* The upper 16 rows of it. */
INLINE void multiply_strip(const uint16_t *rows, const uint16_t *weights, int32_t num_groups,
                           int64_t next, float *out, int64_t out_bytes) {
    _tile_zero(0);
    _tile_zero(1);
    for (int32_t g = 0; g < num_groups; g++, rows += CELLS, weights += CELLS) {
        _tile_loadd(4, rows, STRIDE);
        _tile_loadd(6, weights, STRIDE);
        _tile_loadd(7, weights + next, STRIDE);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, out, out_bytes);
    _tile_stored(1, out + TILE, out_bytes);
}

/* The sums of num_rows rows, with room for 32, to rows out_stride apart. Tile loads and stores do
 * not say what they touch. */
INLINE void multiply_tiles(const uint16_t *rows, const uint16_t *weights, int32_t num_groups,
                           int64_t next, const int far, int64_t num_rows, float *out,
                           int64_t out_stride) {
    const int64_t out_bytes = out_stride * (int64_t)sizeof(float);
    __asm__ volatile("" ::: "memory");
    if (num_rows > TILE)
        multiply_square(rows, weights, num_groups, next, far, out, out_bytes);
    else
        multiply_strip(rows, weights, num_groups, next, out, out_bytes);
    __asm__ volatile("" ::: "memory");
}
#endif
