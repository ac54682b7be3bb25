/* The one place where an instruction set is chosen, and the packing of matrices for it. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "native.h"

const isa *active = &isa_generic;
pthread_mutex_t one_caller = PTHREAD_MUTEX_INITIALIZER;

#if defined(__x86_64__)
#include <cpuid.h>

/* Some compilers do not know F16C by name. The system keeps its registers if it keeps AVX2's. */
static int has_f16c(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && c >> 29 & 1;
}
static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}
static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#define HWCAP_DOT_PRODUCT (1 << 20)
static int has_neon(void) { return (getauxval(AT_HWCAP) & HWCAP_DOT_PRODUCT) != 0; }
#elif defined(__aarch64__)
static int has_neon(void) { return 1; } /* every Apple chip */
#endif

static const isa *find(const char *name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const isa *more = has_avx512() && (!*name || !strcmp(name, "amx")) ? find_amx() : NULL;
    if (more) return more;
    if (has_avx512() && (!*name || !strcmp(name, "avx512"))) return &isa_avx512;
    if (has_avx2() && (!*name || !strcmp(name, "avxvnni"))) more = find_avxvnni();
    if (more) return more;
    if (has_avx2() && (!*name || !strcmp(name, "avx2"))) return &isa_avx2;
#endif
#if defined(__aarch64__)
    if (has_neon() && (!*name || !strcmp(name, "neon"))) return &isa_neon;
#endif
    if (!*name || !strcmp(name, "generic")) return &isa_generic;
    return NULL;
}

/* Choose an instruction set by name, or the best for "". Returns its name, NULL if this CPU lacks
 * it. Matrices that were packed before become unreadable. */
EXPORT const char *octavo_use_isa(const char *name) {
    const isa *found = find(name);
    if (!found) return NULL;
    active = found;
    return active->name;
}

EXPORT const char *octavo_isa(void) { return active->name; }

EXPORT int32_t octavo_packing_version(void) { return PACKING_VERSION; }

EXPORT void octavo_set_threads(int32_t num_threads) {
    pthread_mutex_lock(&one_caller);
    pool_resize(num_threads);
    pthread_mutex_unlock(&one_caller);
}

EXPORT int32_t octavo_get_threads(void) { return pool_threads(); }

/* ---- packing */

EXPORT int64_t octavo_packed_bytes(int32_t kind, int64_t in_features, int64_t out_features) {
    int32_t lanes = active->lanes;
    return divide_up(out_features, lanes) * divide_up(in_features, GROUP) *
           (int64_t)group_bytes(kind, lanes);
}

/* Byte i of a group's quants, as the file has it, from and to lane-wise order. */
static void pack_group(int32_t kind, const uint8_t *block, uint8_t *group, int32_t lane) {
    int32_t lanes = active->lanes, num_vectors = kind == Q8_0 ? 8 : 4;
    uint16_t *scales = (uint16_t *)(group + (size_t)num_vectors * 4 * lanes);
    memcpy(&scales[lane], block, 2);
    const uint8_t *q = block + (kind == Q4_1 ? 4 : 2);
    if (kind == Q4_1) memcpy(&scales[lanes + lane], block + 2, 2);
    for (int32_t v = 0; v < num_vectors; v++) {
        uint8_t *to = group + ((size_t)v * lanes + lane) * 4;
        for (int32_t j = 0; j < 4; j++) {
            if (kind == Q8_0) {
                to[j] = q[4 * v + j] ^ active->flip8;
                continue;
            }
            /* The file has input i in the low half of byte i, input 16 + i in the high half. */
            int32_t a = 8 * v + j, b = a + 4;
            uint8_t low = a < 16 ? q[a] & 15 : q[a - 16] >> 4;
            uint8_t high = b < 16 ? q[b] & 15 : q[b - 16] >> 4;
            to[j] = (uint8_t)(low | high << 4);
        }
    }
}

typedef struct {
    const matrix *m;
    const uint8_t *blocks;
    int64_t row, num_rows;
    int32_t num_chunks;
} pack_context;

static void pack_rows(void *context, int32_t chunk) {
    const pack_context *c = context;
    int32_t kind = c->m->kind, lanes = active->lanes, num_groups = c->m->num_groups;
    size_t block_size = group_bytes(kind, 1), size = group_bytes(kind, lanes);
    ROWS_OF(chunk, c->num_rows, c->num_chunks);
    for (int64_t i = begin; i < end; i++) {
        int64_t row = c->row + i;
        uint8_t *panel = c->m->packed + (size_t)(row / lanes) * num_groups * size;
        for (int32_t g = 0; g < num_groups; g++)
            pack_group(kind, c->blocks + ((size_t)i * num_groups + g) * block_size,
                       panel + g * size, (int32_t)(row % lanes));
    }
}

/* Put GGUF blocks [num_rows][num_groups] in the place of rows [row, row + num_rows). */
EXPORT void octavo_pack(const matrix *m, const uint8_t *blocks, int64_t row, int64_t num_rows) {
    pthread_mutex_lock(&one_caller);
    pack_context c = {m, blocks, row, num_rows, least(divide_up(num_rows, 16), 1 << 20)};
    pool_run(c.num_chunks, pack_rows, &c);
    pthread_mutex_unlock(&one_caller);
}

typedef struct {
    const uint8_t *x;
    int64_t num_rows, size;
    uint8_t *blocks;
    int32_t type, num_chunks;
} to_blocks_context;

static void rows_to_q8_0(void *context, int32_t chunk) {
    const to_blocks_context *c = context;
    int64_t row_bytes = c->size * (c->type == FLOAT32 ? 4 : 2);
    size_t block_bytes = (size_t)divide_up(c->size, GROUP) * 34;
    ROWS_OF(chunk, c->num_rows, c->num_chunks);
    for (int64_t row = begin; row < end; row++)
        active->to_q8_0(c->x + row * row_bytes, c->type, c->size, c->blocks + row * block_bytes);
}

/* Rows of numbers as GGUF's Q8_0 blocks; a last group that is not full is padded with 0. */
EXPORT void octavo_to_q8_0(const void *x, int32_t type, int64_t num_rows, int64_t size,
                           uint8_t *blocks) {
    pthread_mutex_lock(&one_caller);
    to_blocks_context c = {x, num_rows, size, blocks, type, least(divide_up(num_rows, 16), 1 << 20)};
    pool_run(c.num_chunks, rows_to_q8_0, &c);
    pthread_mutex_unlock(&one_caller);
}

/* Rows `ids` of a matrix as float32, [num_ids][in_features]. */
EXPORT void octavo_lookup(const matrix *m, const int64_t *ids, int64_t num_ids, float *out) {
    int32_t lanes = active->lanes, num_vectors = m->kind == Q8_0 ? 8 : 4;
    size_t size = group_bytes(m->kind, lanes);
    for (int64_t i = 0; i < num_ids; i++) {
        int32_t lane = (int32_t)(ids[i] % lanes);
        const uint8_t *group = m->packed + (size_t)(ids[i] / lanes) * m->num_groups * size;
        for (int32_t g = 0; g < m->num_groups; g++, group += size) {
            float values[GROUP];
            const uint16_t *scales = (const uint16_t *)(group + (size_t)num_vectors * 4 * lanes);
            float scale = half_to_float(scales[lane]);
            float base = m->kind == Q4_1 ? half_to_float(scales[lanes + lane]) : 0;
            for (int32_t v = 0; v < num_vectors; v++) {
                const uint8_t *q = group + ((size_t)v * lanes + lane) * 4;
                for (int32_t j = 0; j < 4; j++) {
                    if (m->kind == Q8_0) {
                        values[4 * v + j] = scale * (int8_t)(q[j] ^ active->flip8);
                    } else {
                        int32_t zero = m->kind == Q4_0 ? 8 : 0;
                        values[8 * v + j] = scale * ((q[j] & 15) - zero) + base;
                        values[8 * v + 4 + j] = scale * ((q[j] >> 4) - zero) + base;
                    }
                }
            }
            int32_t num = least(GROUP, m->in_features - (int64_t)g * GROUP);
            memcpy(out + i * m->in_features + g * GROUP, values, num * sizeof(float));
        }
    }
}
