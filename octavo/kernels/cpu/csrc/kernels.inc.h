/* The kernels, written once for vectors of LANES floats. An instruction set defines, before it
 * includes this:
 *   LANES, MR (rows multiplied together), SUMS (sums that attention holds in registers)
 *   vf, vi           vectors of LANES floats and int32s; vfu, viu the same, unaligned: lanes.h
 *   vfma(a, b, c)    a * b + c, rounded once
 *   vmax, vmin       b where a or b is no number
 *   sum_lanes, max_lanes
 *   load_half(p)     LANES float16s as floats; store_half(p, x)
 *   narrow_group(x, to)  GROUP int32s, all within [-127, 127], to bytes
 *   dot(kind, num, weights, q, dots)  adds the products of a group's weights, unpacked, and inputs
 *                    of `num` rows, inputs 0 to 3 of the first of which lie at q
 *   add_neighbours(a, b)  only where `dot` adds up two products of 8 bits in 16: a[0] + a[1] and so
 *                    on, in any order */
#include "vectors.inc.h"

#include "attention.inc.h"
#include "linear.inc.h"
#include "rows.inc.h"
#include "sampling.inc.h"
