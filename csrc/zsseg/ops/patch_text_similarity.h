// Scaled similarity of every patch with every class, class-major.
#pragma once

#include "zsseg/cpu_dispatch.h"
#include "zsseg/ops/depth_parts.h"
#include "zsseg/ops/finite_check.h"
#include "zsseg/tensor_view.h"

namespace zsseg {

struct PatchTextSimilarityParams {
  double logit_scale = 1.0;
  bool normalize = true;      // cosine: each row is divided by its L2 norm; a zero row gives 0
  bool classes_last = false;  // the result is [B,N,C]: a patch's classes lie beside each other
};

struct PatchTextSimilarityOutputs {
  TensorView out;
  FiniteCheck check;
};

// patch_embeds [B,N,D], text_embeds [C,D] or [B,C,D], each float32, float16 or bfloat16, but not
// one float16 and the other bfloat16 -> float32 [B,C,N] = logit_scale * <patch_embeds[b,n],
// text_embeds[c]>, accumulated in float32.
// Checks the inputs and returns the result's shape.
Shape patch_text_similarity_shape(const TensorView& patch_embeds, const TensorView& text_embeds,
                                  const PatchTextSimilarityParams& params);

void patch_text_similarity(const TensorView& patch_embeds, const TensorView& text_embeds,
                           const TensorView& out, const PatchTextSimilarityParams& params,
                           StreamHandle stream, const FiniteCheck& check = {});

// Arguments are checked; out is not empty; D may be 0. On the CPU, the caller looks after `check`.
ZSSEG_DECLARE_CPU_KERNEL(void patch_text_similarity_cpu(const TensorView& patch_embeds,
                                                        const TensorView& text_embeds,
                                                        const PatchTextSimilarityOutputs& outputs,
                                                        const PatchTextSimilarityParams& params))
void patch_text_similarity_cuda(const TensorView& patch_embeds, const TensorView& text_embeds,
                                const PatchTextSimilarityOutputs& outputs,
                                const PatchTextSimilarityParams& params, StreamHandle stream);

}  // namespace zsseg
