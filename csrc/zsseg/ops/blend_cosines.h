// Mask logits and scaled cosines of patches and names, blended into log-odds.
#pragma once

#include "zsseg/cpu_dispatch.h"
#include "zsseg/ops/blend_cosines_math.h"
#include "zsseg/ops/finite_check.h"
#include "zsseg/tensor_view.h"

namespace zsseg {

struct BlendCosinesArgs {
  const TensorView& mask_logits;  // float32 [B, C, h, w]
  const TensorView& cosines;      // float32 [B, C, h, w], scaled
  const TensorView& weights;      // float32 [C]: of the cosines, in [0, 1]
  const TensorView& shares;       // float32 [C]: how much of a class each phrase is; 0: it is none
  blend::Activation activation;   // of the mask logits
};

struct BlendCosinesOutputs {
  const TensorView& out;
  const FiniteCheck& check;
};

// float32 [B, C, h, w]: log-odds of p^(1-w) c^w, where p is the activated mask logit and c the
// class's part of a softmax over the cosines at its cell, in which a term counts `shares`. Absent
// classes stay so and have no part in the softmax; mask logits that are no finite numbers stay.
// Checks the inputs and returns the result's shape.
Shape blend_cosines_shape(const BlendCosinesArgs& args);

// As above into `out`, which may be `mask_logits` or `cosines` itself.
void blend_cosines(const BlendCosinesArgs& args, const TensorView& out, StreamHandle stream,
                   const FiniteCheck& check = {});

// Arguments are checked and not empty. On the CPU, the caller looks after `check`.
ZSSEG_DECLARE_CPU_KERNEL(void blend_cosines_cpu(const BlendCosinesArgs& args,
                                                const BlendCosinesOutputs& outputs))
void blend_cosines_cuda(const BlendCosinesArgs& args, const BlendCosinesOutputs& outputs,
                        StreamHandle stream);

}  // namespace zsseg
