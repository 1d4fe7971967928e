// Projected relation of an image with every class: [cls * text, text] W^T + b, without the
// concatenation.
#pragma once

#include "zsseg/cpu_dispatch.h"
#include "zsseg/ops/depth_parts.h"
#include "zsseg/tensor_view.h"

namespace zsseg {

// cls_embed, text_embeds and weight are all float32, all float16 or all bfloat16; the rest is
// float32. An absent array is a default-constructed view.
struct RelationshipDescriptorInputs {
  TensorView cls_embed;     // [B,D]; absent for the text half alone
  TensorView text_embeds;   // [C,D]
  TensorView weight;        // [E,2D]
  TensorView bias;          // [E]
  TensorView text_queries;  // [C,E], the text half computed before; absent to compute it now
  TensorView workspace;     // as DepthWorkspace says, or absent: then no blocks share the depth
};

// -> [B,C,E] = (cls[b] * text[c]) W[:, :D]^T + (text_queries[c] or text[c] W[:, D:]^T + b).
// The sums are float32, and the result is that or of the text's dtype. Checks the inputs and
// returns the result's shape.
Shape relationship_descriptor_shape(const RelationshipDescriptorInputs& inputs);
void relationship_descriptor(const RelationshipDescriptorInputs& inputs, const TensorView& out,
                             StreamHandle stream);

// The half that does not depend on the image -> [C,E] = text W[:, D:]^T + b.
Shape relationship_descriptor_text_shape(const RelationshipDescriptorInputs& inputs);
void relationship_descriptor_text(const RelationshipDescriptorInputs& inputs, const TensorView& out,
                                  StreamHandle stream);

// Arguments are checked; out is not empty; D may be 0. Without cls_embed, out is the text half.
ZSSEG_DECLARE_CPU_KERNEL(void relationship_descriptor_cpu(
    const RelationshipDescriptorInputs& inputs, const TensorView& out))
void relationship_descriptor_cuda(const RelationshipDescriptorInputs& inputs, const TensorView& out,
                                  StreamHandle stream);

}  // namespace zsseg
