#include "zsseg/ops/camera_frame.h"

#include <string>

#include "zsseg/check.h"
#include "zsseg/error.h"

namespace zsseg {

void expect_sides(const char* name, const TensorView& pixels) {
  for (int axis = 0; axis < 2; ++axis) {
    if (pixels.shape[axis] < 1 || pixels.shape[axis] > kMaxSide) {
      throw ShapeError(std::string(name) + ": expected sides from 1 to " +
                       std::to_string(kMaxSide) + ", got " + to_string(pixels.shape) +
                       ". Check that it was read.");
    }
  }
}

void expect_planes(const CameraFrame& frame) {
  const TensorView& luma = frame.pixels;
  const TensorView& chroma = *frame.chroma;
  expect_dtype("frame[0]", luma, {DType::uint8});
  expect_shape("frame[0]", luma, {kAnySize, kAnySize});
  expect_dtype("frame[1]", chroma, {DType::uint8});
  expect_sides("frame", luma);
  if (luma.shape[0] % 2 != 0 || luma.shape[1] % 2 != 0) {
    throw ShapeError("frame[0]: expected even sides, got " + to_string(luma.shape) +
                     ". NV12 has one colour for two by two pixels.");
  }
  expect_shape("frame[1]", chroma, {luma.shape[0] / 2, luma.shape[1] / 2, 2});
  expect_same_device("frame[1]", chroma, "frame[0]", luma);
  if (frame.luma_row() > INT32_MAX || frame.chroma_row() > INT32_MAX) {
    throw ShapeError("frame: expected rows less than 2 GiB apart, got planes that are not.");
  }
}

}  // namespace zsseg
