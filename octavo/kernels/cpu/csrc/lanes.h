/* Vectors of LANES numbers, for every instruction set. */
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint8_t vb __attribute__((vector_size(4 * LANES)));
typedef float vfu __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t viu __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint8_t vbu __attribute__((vector_size(4 * LANES), aligned(1), may_alias));

#define INLINE_ISA static inline __attribute__((always_inline))
