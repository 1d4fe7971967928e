#include "zsseg/ops/warp_blend.h"

#include "zsseg/check.h"
#include "zsseg/kernel_dispatch.h"
#include "zsseg/ops/class_logits.h"

namespace zsseg {
namespace {

void expect_sizes(const TensorView& logits) {
  expect_shape("logits", logits, {kAnySize, kAnySize, kAnySize, kAnySize});
  expect_class_logits(logits);
}

}  // namespace

Shape warp_blend_shape(const WarpBlendArgs& args) {
  const Shape& shape = args.logits.shape;
  expect_dtype("logits", args.logits, {DType::float32});
  expect_sizes(args.logits);
  expect_dtype("past", args.past, {DType::float32});
  expect_shape("past", args.past, shape);
  expect_dtype("flow", args.flow, {DType::float32});
  expect_shape("flow", args.flow, {shape[0], shape[2], shape[3], 2});
  expect_dtype("past_weight", args.past_weight, {DType::float32});
  expect_shape("past_weight", args.past_weight, {shape[0], shape[2], shape[3]});
  expect_same_device("past", args.past, "logits", args.logits);
  expect_same_device("flow", args.flow, "logits", args.logits);
  expect_same_device("past_weight", args.past_weight, "logits", args.logits);
  return shape;
}

void warp_blend(const WarpBlendArgs& args, const TensorView& out, StreamHandle stream) {
  const Shape shape = warp_blend_shape(args);
  expect_dtype("out", out, {DType::float32});
  expect_shape("out", out, shape);
  expect_same_device("out", out, "logits", args.logits);
  if (out.count() > 0) {
    ZSSEG_RUN_KERNEL(out, warp_blend, stream, args, out);
  }
}

}  // namespace zsseg
