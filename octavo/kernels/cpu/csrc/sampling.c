/* From logits to tokens: the functions that Python calls. */
#include <stdatomic.h>
#include <string.h>

#include "native.h"

/* splitmix64, as octavo/kernels/random.py has it. */
#define GOLDEN 0x9E3779B97F4A7C15u

static uint64_t mix(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

static float uniform(int64_t seed, int64_t position) {
    uint64_t state = mix((uint64_t)seed + GOLDEN) + (uint64_t)position * GOLDEN;
    return (float)(mix(state) >> 40) * 5.9604644775390625e-8f;
}

typedef struct {
    const float *logits;
    int64_t num_rows, size, work_floats;
    float *work; /* work_floats for each chunk */
    _Atomic int64_t next_row;
    /* sample */
    const float *temperature, *top_p, *min_p;
    const int64_t *top_k, *seeds, *positions;
    int64_t *tokens;
    /* rate */
    int32_t num_top;
    int64_t *ids, *ranks;
    float *logprobs;
} choice_context;

/* As many chunks as threads, which share out the rows one by one: each chunk has its own memory. */
static void for_each_row(choice_context *c, task run) {
    int64_t num_strips = divide_up(c->size, STRIP);
    int32_t num_chunks = least(c->num_rows, pool_threads());
    c->work_floats = num_strips * (2 + 2 * STRIP);
    c->work = scratch((size_t)(c->work_floats * num_chunks) * sizeof(float));
    pool_run(num_chunks, run, c);
}

static void sample_rows(void *context, int32_t chunk) {
    choice_context *c = context;
    for (int64_t row; (row = atomic_fetch_add(&c->next_row, 1)) < c->num_rows;) {
        choice chosen = {c->temperature[row], c->top_p[row], c->min_p[row],
                         uniform(c->seeds[row], c->positions[row]), c->top_k[row]};
        c->tokens[row] = active->draw(c->logits + row * c->size, c->size, &chosen,
                                      c->work + chunk * c->work_floats);
    }
}

/* A token for each row of logits, [num_rows][size]. */
EXPORT void octavo_sample(const float *logits, int64_t num_rows, int64_t size,
                          const float *temperature, const float *top_p, const float *min_p,
                          const int64_t *top_k, const int64_t *seeds, const int64_t *positions,
                          int64_t *tokens) {
    choice_context c = {.logits = logits, .num_rows = num_rows, .size = size,
                        .temperature = temperature, .top_p = top_p, .min_p = min_p, .top_k = top_k,
                        .seeds = seeds, .positions = positions, .tokens = tokens};
    pthread_mutex_lock(&one_caller);
    for_each_row(&c, sample_rows);
    pthread_mutex_unlock(&one_caller);
}

static void rate_rows(void *context, int32_t chunk) {
    choice_context *c = context;
    for (int64_t row; (row = atomic_fetch_add(&c->next_row, 1)) < c->num_rows;) {
        int64_t at = row * (c->num_top + 1);
        c->ranks[row] = active->rate(c->logits + row * c->size, c->size, c->num_top, c->ids + at,
                                     c->logprobs + at, c->work + chunk * c->work_floats);
    }
}

/* ids, logprobs: [num_rows][1 + num_top]. The first id of each row goes in, the others come out. */
EXPORT void octavo_rate(const float *logits, int64_t num_rows, int64_t size, int32_t num_top,
                        int64_t *ids, float *logprobs, int64_t *ranks) {
    choice_context c = {.logits = logits, .num_rows = num_rows, .size = size, .num_top = num_top,
                        .ids = ids, .logprobs = logprobs, .ranks = ranks};
    pthread_mutex_lock(&one_caller);
    for_each_row(&c, rate_rows);
    pthread_mutex_unlock(&one_caller);
}

typedef struct {
    float repetition, frequency, presence;
} penalties;

/* Penalise a row's tokens that were seen, eight of which are looked at together, in place. */
EXPORT void octavo_penalise(float *logits, int64_t size, const uint8_t *seen,
                            const int32_t *counts, const penalties *p) {
    for (int64_t start = 0; start < size; start += 8) {
        uint64_t any = 0;
        int64_t stop = least(start + 8, size);
        memcpy(&any, seen + start, (size_t)(stop - start));
        for (int64_t i = start; any && i < stop; i++) {
            if (!seen[i]) continue;
            float x = logits[i] > 0 ? logits[i] / p->repetition : logits[i] * p->repetition;
            logits[i] = x - p->frequency * (float)counts[i] - (counts[i] > 0 ? p->presence : 0);
        }
    }
}
