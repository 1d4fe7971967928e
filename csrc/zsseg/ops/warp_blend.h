// Past logits, moved along a flow field and blended with new ones.
#pragma once

#include "zsseg/cpu_dispatch.h"
#include "zsseg/tensor_view.h"

namespace zsseg {

struct WarpBlendArgs {
  const TensorView& logits;       // float32 [B, C, h, w]
  const TensorView& past;         // float32 [B, C, h, w]
  const TensorView& flow;         // float32 [B, h, w, 2]: x, then y, in cells, from new to past
  const TensorView& past_weight;  // float32 [B, h, w]
};

// float32 [B, C, h, w]: at each cell (1 - v) * logits + v * past(cell + flow), where past is
// sampled bilinearly between the centres of cells, edges clamped, and v is past_weight, at most 1.
// Where it is not above 0, or the flow leads out of the grid, it is logits. NaN counts as outside
// and as 0. Checks the inputs and returns the result's shape.
Shape warp_blend_shape(const WarpBlendArgs& args);

// As above into `out`, which may be `logits` itself but must not share memory with `past`.
void warp_blend(const WarpBlendArgs& args, const TensorView& out, StreamHandle stream);

// Arguments are checked and not empty.
ZSSEG_DECLARE_CPU_KERNEL(void warp_blend_cpu(const WarpBlendArgs& args, const TensorView& out))
void warp_blend_cuda(const WarpBlendArgs& args, const TensorView& out, StreamHandle stream);

}  // namespace zsseg
