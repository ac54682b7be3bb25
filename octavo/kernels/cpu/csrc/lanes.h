/* Vectors of LANES numbers, for every instruction set. */
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef float vfu __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t viu __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE_ISA static inline __attribute__((always_inline))
