#include "zsseg/ops/bilateral_upsample.h"

#include <string>

#include "zsseg/check.h"
#include "zsseg/error.h"
#include "zsseg/kernel_dispatch.h"
#include "zsseg/ops/bilateral_upsample_math.h"
#include "zsseg/ops/class_logits.h"

namespace zsseg {
namespace {

constexpr float kFarthestReach = 16.0f;

void check_settings(const BilateralUpsampleArgs& args) {
  if (args.scale % 2 == 0 || args.scale < bilateral::kLeastScale ||
      args.scale > bilateral::kMostScale) {
    fail_argument("scale", "3, 5, 7 or 9", std::to_string(args.scale));
  }
  if (!(args.reach >= 0x1p-10f && args.reach <= kFarthestReach)) {
    fail_argument("reach", "a distance of colours from 0.001 to 16",
                  to_text(static_cast<double>(args.reach)));
  }
}

std::int64_t points_of(std::int64_t cells, const BilateralUpsampleArgs& args) {
  return args.align == Align::kCorners ? (cells - 1) * args.scale + 1 : cells * args.scale;
}

}  // namespace

Shape bilateral_upsample_shape(const BilateralUpsampleArgs& args) {
  check_settings(args);
  expect_dtype("logits", args.logits, {DType::float32});
  expect_shape("logits", args.logits, {kAnySize, kAnySize, kAnySize, kAnySize});
  expect_class_logits(args.logits);
  const Shape& grid = args.logits.shape;
  const std::int64_t height = points_of(grid[2], args), width = points_of(grid[3], args);
  if (!is_image_side(height) || !is_image_side(width)) {
    throw ShapeError("logits: expected sides of at most 32767 points on the finer grid, got " +
                     to_string(grid) + " times " + std::to_string(args.scale) +
                     ". Use a smaller scale.");
  }
  expect_dtype("guide", args.guide, {DType::float32});
  expect_shape("guide", args.guide, {grid[0], 3, height, width});
  expect_same_device("guide", args.guide, "logits", args.logits);
  return {grid[0], grid[1], height, width};
}

void bilateral_upsample(const BilateralUpsampleArgs& args, const TensorView& out,
                        StreamHandle stream) {
  const Shape shape = bilateral_upsample_shape(args);
  expect_dtype("out", out, {DType::float32});
  expect_shape("out", out, shape);
  expect_same_device("out", out, "logits", args.logits);
  if (out.count() > 0) {
    ZSSEG_RUN_KERNEL(out, bilateral_upsample, stream, args, out);
  }
}

}  // namespace zsseg
