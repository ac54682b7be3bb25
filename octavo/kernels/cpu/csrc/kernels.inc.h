/* The kernels, written once for vectors of LANES floats. An instruction set defines, before it
 * includes this:
 *   LANES, MR (rows multiplied together), SUMS (sums that attention holds in registers)
 *   vf, vi           vectors of LANES floats and int32s; vfu, viu the same, unaligned: lanes.h
 *   vfma(a, b, c)    a * b + c, rounded once
 *   vmax, vmin       b where a or b is no number
 *   sum_lanes, max_lanes
 *   load_half(p)     LANES float16s as floats; store_half(p, x)
 *   narrow_group(x, to)  GROUP int32s, all within [-127, 127], to bytes
 *   dot_q4, dot_q8   see multiply_panel
 *   add_neighbours(a, b)  only where dot_q8 adds two products in 16 bits: a[0] + a[1] and so on */
#include "vectors.inc.h"

#include "attention.inc.h"
#include "linear.inc.h"
#include "rows.inc.h"
#include "sampling.inc.h"
