#include "zsseg/ops/preprocess.h"

#include <cmath>
#include <string>

#include "zsseg/check.h"
#include "zsseg/error.h"
#include "zsseg/kernel_dispatch.h"

namespace zsseg {

Shape preprocess_shape(const TensorView& frame, const PreprocessParams& params) {
  expect_dtype("frame", frame, {DType::uint8});
  expect_shape("frame", frame, {kAnySize, kAnySize, 3});
  for (int axis = 0; axis < 2; ++axis) {
    if (frame.shape[axis] < 1 || frame.shape[axis] > kMaxSide) {
      throw ShapeError("frame: expected sides from 1 to " + std::to_string(kMaxSide) + ", got " +
                       to_string(frame.shape) + ". Check that the frame was read.");
    }
  }
  if (params.height < 1 || params.height > kMaxSide || params.width < 1 ||
      params.width > kMaxSide) {
    throw ShapeError("size_hw: expected sides from 1 to " + std::to_string(kMaxSide) + ", got " +
                     "(" + std::to_string(params.height) + ", " + std::to_string(params.width) +
                     "). Pass (height, width).");
  }
  for (int channel = 0; channel < 3; ++channel) {
    if (!std::isfinite(params.mean[channel])) {
      fail_argument("mean", "3 finite numbers", to_text(params.mean[channel]));
    }
    if (!(params.std[channel] > 0.0 && std::isfinite(params.std[channel]))) {
      fail_argument("std", "3 finite numbers above 0", to_text(params.std[channel]));
    }
  }
  return {3, params.height, params.width};
}

void preprocess(const TensorView& frame, const TensorView& out, const PreprocessParams& params,
                StreamHandle stream) {
  const Shape shape = preprocess_shape(frame, params);
  expect_dtype("out", out, {DType::float32});
  expect_shape("out", out, shape);
  expect_same_device("out", out, "frame", frame);
  ZSSEG_RUN_KERNEL(out, preprocess, stream, frame, out, params);
}

}  // namespace zsseg
