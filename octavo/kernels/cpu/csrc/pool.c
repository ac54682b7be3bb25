/* A thread pool for short parallel loops, made to share its cores with others.
 *
 * Chunks are claimed one by one, by the caller as well, so a worker that gets no time slice holds
 * nothing up: it claims nothing. A loop ends when its chunks are done, not when the workers have
 * all come by. Workers spin for SPIN_NS after the last chunk (the next loop of a forward pass is
 * microseconds away), then sleep. */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#include "native.h"

#define MAX_THREADS 256
#define SPIN_NS 50000
#define CHUNK_BITS 24
#define CHUNK_MASK ((1ull << CHUNK_BITS) - 1)

/* Epoch (16 bits), number of chunks (24), next chunk (24) in one word: a claim that succeeds is of
 * the loop whose number of chunks was read, and keeps that loop's fields in place until it is done. */
static _Atomic uint64_t state;
static _Atomic int32_t num_done;
static task loop_task;
static void *loop_context;

static _Atomic int32_t num_sleeping;
static pthread_mutex_t sleep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work_came = PTHREAD_COND_INITIALIZER;

static int32_t num_threads = 1; /* the caller included */
static int32_t num_started;     /* workers; they are never stopped */
static _Atomic int32_t num_active;

static inline void pause_cpu(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static inline int has_chunks(uint64_t s) {
    return (s & CHUNK_MASK) < ((s >> CHUNK_BITS) & CHUNK_MASK);
}

/* Claim and run chunks until none is left. */
static void work(void) {
    uint64_t s = atomic_load_explicit(&state, memory_order_acquire);
    while (has_chunks(s)) {
        if (!atomic_compare_exchange_weak_explicit(&state, &s, s + 1, memory_order_acq_rel,
                                                   memory_order_acquire))
            continue;
        loop_task(loop_context, (int32_t)(s & CHUNK_MASK));
        atomic_fetch_add_explicit(&num_done, 1, memory_order_release);
        s = atomic_load_explicit(&state, memory_order_acquire);
    }
}

static void *worker(void *argument) {
    int32_t index = (int32_t)(intptr_t)argument;
    for (;;) {
        int64_t deadline = now_ns() + SPIN_NS;
        int found = 0;
        do {
            for (int i = 0; i < 32 && !found; i++) {
                found = index < atomic_load(&num_active) && has_chunks(atomic_load(&state));
                if (!found) pause_cpu();
            }
        } while (!found && now_ns() < deadline);
        if (!found) {
            pthread_mutex_lock(&sleep_lock);
            atomic_fetch_add(&num_sleeping, 1);
            while (!(index < atomic_load(&num_active) && has_chunks(atomic_load(&state))))
                pthread_cond_wait(&work_came, &sleep_lock);
            atomic_fetch_sub(&num_sleeping, 1);
            pthread_mutex_unlock(&sleep_lock);
        }
        work();
    }
    return NULL;
}

/* After a fork only the calling thread is left, and the others' locks are in any state. */
static void after_fork(void) {
    num_started = 0;
    atomic_store(&num_sleeping, 0);
    pthread_mutex_init(&sleep_lock, NULL);
    pthread_cond_init(&work_came, NULL);
}

static void start_workers(void) {
    static int registered;
    if (!registered) {
        registered = 1;
        pthread_atfork(NULL, NULL, after_fork);
    }
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 2 << 20);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    for (; num_started < num_threads - 1; num_started++) {
        pthread_t thread;
        if (pthread_create(&thread, &attributes, worker, (void *)(intptr_t)num_started)) break;
    }
    pthread_attr_destroy(&attributes);
}

int32_t pool_threads(void) { return num_threads; }

void pool_resize(int32_t wanted) {
    num_threads = wanted < 1 ? 1 : wanted > MAX_THREADS ? MAX_THREADS : wanted;
    atomic_store(&num_active, num_threads - 1);
}

/* run(context, i) for i in [0, num_chunks), in any order, on all threads. One caller at a time. */
void pool_run(int32_t num_chunks, task run, void *context) {
    if (num_chunks <= 1 || num_threads == 1) {
        for (int32_t i = 0; i < num_chunks; i++) run(context, i);
        return;
    }
    if (num_started < num_threads - 1) start_workers();
    loop_task = run;
    loop_context = context;
    atomic_store_explicit(&num_done, 0, memory_order_relaxed);
    uint64_t epoch = (atomic_load_explicit(&state, memory_order_relaxed) >> 48) + 1;
    atomic_store(&state, epoch << 48 | (uint64_t)num_chunks << CHUNK_BITS);
    if (atomic_load(&num_sleeping)) {
        pthread_mutex_lock(&sleep_lock);
        pthread_cond_broadcast(&work_came);
        pthread_mutex_unlock(&sleep_lock);
    }
    work();
    int64_t deadline = 0;
    for (int spins = 0; atomic_load_explicit(&num_done, memory_order_acquire) < num_chunks;) {
        pause_cpu();
        if (++spins % 64) continue;
        /* Whoever has the last chunk may need this core to finish it. */
        if (!deadline) deadline = now_ns() + SPIN_NS;
        else if (now_ns() > deadline) sched_yield();
    }
}
