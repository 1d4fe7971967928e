#include "zsseg/ops/merge_windows.h"

#include <string>

#include "zsseg/check.h"
#include "zsseg/error.h"
#include "zsseg/kernel_dispatch.h"
#include "zsseg/ops/class_logits.h"

namespace zsseg {

Shape merge_windows_shape(const MergeWindowsArgs& args) {
  expect_dtype("logits", args.logits, {DType::float32});
  expect_shape("logits", args.logits, {kAnySize, kAnySize, kAnySize, kAnySize});
  expect_class_logits(args.logits);
  expect_dtype("shares", args.shares, {DType::float32});
  expect_shape("shares", args.shares, {kAnySize, kAnySize});
  if (!is_image_side(args.shares.shape[0]) || !is_image_side(args.shares.shape[1])) {
    throw ShapeError("shares: expected sides from 1 to 32767, got " + to_string(args.shares.shape) +
                     ". Give one for each cell of the grid.");
  }
  expect_same_device("shares", args.shares, "logits", args.logits);
  if (args.places.count != args.logits.shape[0]) {
    fail_argument("places", "one for each of " + std::to_string(args.logits.shape[0]) + " windows",
                  std::to_string(args.places.count));
  }
  return {1, args.logits.shape[1], args.shares.shape[0], args.shares.shape[1]};
}

void merge_windows(const MergeWindowsArgs& args, const TensorView& out, StreamHandle stream) {
  const Shape shape = merge_windows_shape(args);
  expect_dtype("out", out, {DType::float32});
  expect_shape("out", out, shape);
  expect_same_device("out", out, "logits", args.logits);
  ZSSEG_RUN_KERNEL(out, merge_windows, stream, args, out);
}

}  // namespace zsseg
