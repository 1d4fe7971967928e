#include "zsseg/ops/blend_cosines.h"

#include "zsseg/check.h"
#include "zsseg/kernel_dispatch.h"
#include "zsseg/ops/all_finite.h"
#include "zsseg/ops/class_logits.h"
#include "zsseg/ops/depth_parts.h"

namespace zsseg {

Shape blend_cosines_shape(const BlendCosinesArgs& args) {
  const Shape& shape = args.mask_logits.shape;
  expect_dtype("mask_logits", args.mask_logits, {DType::float32});
  expect_shape("mask_logits", args.mask_logits, {kAnySize, kAnySize, kAnySize, kAnySize});
  expect_class_logits(args.mask_logits, "mask_logits");
  expect_dtype("cosines", args.cosines, {DType::float32});
  expect_shape("cosines", args.cosines, shape);
  expect_dtype("weights", args.weights, {DType::float32});
  expect_shape("weights", args.weights, {shape[1]});
  expect_dtype("shares", args.shares, {DType::float32});
  expect_shape("shares", args.shares, {shape[1]});
  expect_same_device("cosines", args.cosines, "mask_logits", args.mask_logits);
  expect_same_device("weights", args.weights, "mask_logits", args.mask_logits);
  expect_same_device("shares", args.shares, "mask_logits", args.mask_logits);
  return shape;
}

void blend_cosines(const BlendCosinesArgs& args, const TensorView& out, StreamHandle stream,
                   const FiniteCheck& check) {
  const Shape shape = blend_cosines_shape(args);
  expect_dtype("out", out, {DType::float32});
  expect_shape("out", out, shape);
  expect_same_device("out", out, "mask_logits", args.mask_logits);
  expect_workspace(check.workspace, "mask_logits", args.mask_logits);
  expect_finite_check(check, "mask_logits", args.mask_logits);
  if (out.count() > 0) {
    const BlendCosinesOutputs outputs{out, check};
    ZSSEG_RUN_KERNEL(out, blend_cosines, stream, args, outputs);
  }
  const bool is_told = out.count() > 0 && out.device.is_cuda();  // by the kernel
  if (check.finite.data != nullptr && !is_told) {
    all_finite(out, check.finite, stream);
  }
}

}  // namespace zsseg
