// From a camera frame to a network's input, in one pass.
#pragma once

#include <array>

#include "zsseg/cpu_dispatch.h"
#include "zsseg/ops/align.h"
#include "zsseg/tensor_view.h"

namespace zsseg {

constexpr std::int64_t kMaxSide = 32767;  // longest side of frames and results

// ITU-R's two ways from a camera's brightness and colour to RGB, of limited range and of full.
enum class ColourMatrix { kBt601, kBt709, kBt601Full, kBt709Full };

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

// What a camera delivers: uint8 [H,W,3], or NV12: brightness uint8 [H,W] with even sides, and
// colour uint8 [H/2,W/2,2], U then V of every two by two pixels.
struct CameraFrame {
  TensorView pixels;
  const TensorView* chroma = nullptr;
  // Of NV12: bytes from one row of a plane to the next, at least W; 0 means W.
  std::int64_t luma_row_bytes = 0;
  std::int64_t chroma_row_bytes = 0;

  std::int64_t luma_row() const { return luma_row_bytes == 0 ? pixels.shape[1] : luma_row_bytes; }
  std::int64_t chroma_row() const {
    return chroma_row_bytes == 0 ? pixels.shape[1] : chroma_row_bytes;
  }
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
