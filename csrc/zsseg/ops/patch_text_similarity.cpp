#include "zsseg/ops/patch_text_similarity.h"

#include <cmath>

#include "zsseg/check.h"
#include "zsseg/kernel_dispatch.h"

namespace zsseg {

Shape patch_text_similarity_shape(const TensorView& patch_embeds, const TensorView& text_embeds,
                                  const PatchTextSimilarityParams& params) {
  expect_dtype("patch_embeds", patch_embeds, {DType::float32, DType::float16});
  expect_shape("patch_embeds", patch_embeds, {kAnySize, kAnySize, kAnySize});
  expect_dtype("text_embeds", text_embeds, {DType::float32, DType::float16});
  const std::int64_t batch = patch_embeds.shape[0];
  const std::int64_t embed_dim = patch_embeds.shape[2];
  const bool shared = text_embeds.shape.rank != 3;
  if (shared) {
    expect_shape("text_embeds", text_embeds, {kAnySize, embed_dim});
  } else {
    expect_shape("text_embeds", text_embeds, {batch, kAnySize, embed_dim});
  }
  expect_same_device("text_embeds", text_embeds, "patch_embeds", patch_embeds);
  if (!std::isfinite(params.logit_scale)) {
    fail_argument("logit_scale", "a finite number", to_text(params.logit_scale));
  }
  return {batch, text_embeds.shape[shared ? 0 : 1], patch_embeds.shape[1]};
}

void patch_text_similarity(const TensorView& patch_embeds, const TensorView& text_embeds,
                           const TensorView& out, const PatchTextSimilarityParams& params,
                           StreamHandle stream) {
  const Shape shape = patch_text_similarity_shape(patch_embeds, text_embeds, params);
  expect_dtype("out", out, {DType::float32});
  expect_shape("out", out, shape);
  expect_same_device("out", out, "patch_embeds", patch_embeds);
  if (out.count() > 0) {
    ZSSEG_RUN_KERNEL(out, patch_text_similarity, stream, patch_embeds, text_embeds, out, params);
  }
}

}  // namespace zsseg
