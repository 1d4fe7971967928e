#include "zsseg/ops/preprocess.h"

#include <cmath>
#include <string>

#include "zsseg/check.h"
#include "zsseg/error.h"
#include "zsseg/kernel_dispatch.h"

namespace zsseg {
namespace {

// A part of a resized frame begins in it.
void check_whole(const char* side, std::int64_t size, std::int64_t begin) {
  if (size < 1 || size > kMaxSide) {
    throw ShapeError(std::string("whole_hw: expected sides from 1 to ") + std::to_string(kMaxSide) +
                     ", got the " + side + " " + std::to_string(size) + ". Pass (height, width).");
  }
  if (begin < 0 || begin >= size) {
    fail_argument("origin", std::string("from 0 to below the ") + side + " " + std::to_string(size),
                  std::to_string(begin));
  }
}

}  // namespace

Shape preprocess_shape(const CameraFrame& frame, const PreprocessParams& params) {
  if (frame.chroma != nullptr) {
    expect_planes(frame);
    if (params.bgr) {
      fail_argument("channel_order", "'rgb' for a frame in two planes", "'bgr'");
    }
  } else {
    expect_dtype("frame", frame.pixels, {DType::uint8});
    expect_shape("frame", frame.pixels, {kAnySize, kAnySize, 3});
    expect_sides("frame", frame.pixels);
  }
  if (params.height < 1 || params.height > kMaxSide || params.width < 1 ||
      params.width > kMaxSide) {
    throw ShapeError("size_hw: expected sides from 1 to " + std::to_string(kMaxSide) + ", got " +
                     "(" + std::to_string(params.height) + ", " + std::to_string(params.width) +
                     "). Pass (height, width).");
  }
  check_whole("height", params.resized_height(), params.top);
  check_whole("width", params.resized_width(), params.left);
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

void preprocess(const CameraFrame& frame, const TensorView& out, const PreprocessParams& params,
                StreamHandle stream) {
  const Shape shape = preprocess_shape(frame, params);
  expect_dtype("out", out, {DType::float32, DType::float16, DType::bfloat16});
  expect_shape("out", out, shape);
  expect_same_device("out", out, "frame", frame.pixels);
  ZSSEG_RUN_KERNEL(out, preprocess, stream, frame, out, params);
}

}  // namespace zsseg
