// Grouped-query attention of a step of up to 32 rows in one kernel: norms and rotations of its heads, its keys and values into the cache, the parts
// of attention, their join, and the digits that the product behind it reads. As kernels of their own these are eight, with nothing to do each.
//
// A block has one part of the keys and the heads that share them, a warp each, and one warp more. The rows of the step are not in the cache yet
// where another block would read them: whoever has a part with such a key makes it for itself. The last block of a row's heads joins their parts.
//
// Results are those of rms_norm, rope and kv_store of rows.cu and of attend and attend_join of attention.cu bit for bit.
#include "attend_rows.cuh"

struct GqaArgs { AttendArgs attend; StepHeads heads; };
// Grid (parts, blocks of heads, rows).
#define GQA(D) \
  KERNEL __launch_bounds__(288) gqa##D##_bf16(const __grid_constant__ GqaArgs a) { attend<u16, D, true>(a.attend, &a.heads); } \
  KERNEL __launch_bounds__(288) gqa##D##_f32(const __grid_constant__ GqaArgs a) { attend<float, D, true>(a.attend, &a.heads); }
GQA(1) GQA(2) GQA(4)
