// From a camera frame to a network's input, in one pass.
#pragma once

#include <array>

#include "zsseg/cpu_dispatch.h"
#include "zsseg/ops/align.h"
#include "zsseg/ops/camera_frame.h"

namespace zsseg {

struct PreprocessParams {
  std::int64_t height = 0;  // of the result
  std::int64_t width = 0;
  std::array<double, 3> mean{};  // in units of 0..1, in RGB order
  std::array<double, 3> std{};
  bool bgr = false;                            // the frame's channel order; the result is RGB
  ColourMatrix matrix = ColourMatrix::kBt601;  // of an NV12 frame
  Align align = Align::kHalfPixel;
  // The result is a part of the resized frame: that from (top, left) on. 0: all of it.
  std::int64_t whole_height = 0;
  std::int64_t whole_width = 0;
  std::int64_t top = 0;
  std::int64_t left = 0;

  std::int64_t resized_height() const { return whole_height == 0 ? height : whole_height; }
  std::int64_t resized_width() const { return whole_width == 0 ? width : whole_width; }
};

// frame -> float32, float16 or bfloat16 [3,h,w] = (bilinear(frame) / 255 - mean) / std. By
// `align`, no antialiasing, edges clamped; NV12 becomes RGB, rounded to bytes, before it is
// resized. Beyond the resized frame its edge is repeated. Checks the inputs and returns the shape.
Shape preprocess_shape(const CameraFrame& frame, const PreprocessParams& params);

void preprocess(const CameraFrame& frame, const TensorView& out, const PreprocessParams& params,
                StreamHandle stream);

// Arguments are checked and not empty.
ZSSEG_DECLARE_CPU_KERNEL(void preprocess_cpu(const CameraFrame& frame, const TensorView& out,
                                             const PreprocessParams& params))
void preprocess_cuda(const CameraFrame& frame, const TensorView& out,
                     const PreprocessParams& params, StreamHandle stream);

}  // namespace zsseg
