#include "zsseg/ops/patch_text_similarity.h"

#include <cmath>
#include <cstdint>

#include "zsseg/check.h"
#include "zsseg/kernel_dispatch.h"
#include "zsseg/ops/all_finite.h"

namespace zsseg {
namespace {

// The dtypes of text embeddings next to patches of a dtype.
void expect_text_dtype(const TensorView& text_embeds, DType patches) {
  if (patches == DType::float32) {
    expect_dtype("text_embeds", text_embeds, {DType::float32, DType::float16, DType::bfloat16});
  } else {
    expect_dtype("text_embeds", text_embeds, {DType::float32, patches});
  }
}

}  // namespace

Shape patch_text_similarity_shape(const TensorView& patch_embeds, const TensorView& text_embeds,
                                  const PatchTextSimilarityParams& params) {
  expect_dtype("patch_embeds", patch_embeds, {DType::float32, DType::float16, DType::bfloat16});
  expect_shape("patch_embeds", patch_embeds, {kAnySize, kAnySize, kAnySize});
  expect_text_dtype(text_embeds, patch_embeds.dtype);
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
  const std::int64_t num_classes = text_embeds.shape[shared ? 0 : 1];
  const std::int64_t num_patches = patch_embeds.shape[1];
  return params.classes_last ? Shape{batch, num_patches, num_classes}
                             : Shape{batch, num_classes, num_patches};
}

void patch_text_similarity(const TensorView& patch_embeds, const TensorView& text_embeds,
                           const TensorView& out, const PatchTextSimilarityParams& params,
                           StreamHandle stream, const FiniteCheck& check) {
  const Shape shape = patch_text_similarity_shape(patch_embeds, text_embeds, params);
  expect_dtype("out", out, {DType::float32});
  expect_shape("out", out, shape);
  expect_same_device("out", out, "patch_embeds", patch_embeds);
  expect_workspace(check.workspace, "patch_embeds", patch_embeds);
  expect_finite_check(check, "patch_embeds", patch_embeds);
  if (out.count() > 0) {
    const PatchTextSimilarityOutputs outputs{out, check};
    ZSSEG_RUN_KERNEL(out, patch_text_similarity, stream, patch_embeds, text_embeds, outputs,
                     params);
  }
  const bool is_told = out.count() > 0 && out.device.is_cuda();  // by the kernel
  if (check.finite.data != nullptr && !is_told) {
    all_finite(out, check.finite, stream);
  }
}

}  // namespace zsseg
