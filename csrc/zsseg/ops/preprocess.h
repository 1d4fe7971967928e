// From a camera frame to a network's input, in one pass.
#pragma once

#include <array>

#include "zsseg/cpu_dispatch.h"
#include "zsseg/tensor_view.h"

namespace zsseg {

constexpr std::int64_t kMaxSide = 32767;  // longest side of frames and results

struct PreprocessParams {
  std::int64_t height = 0;  // of the result
  std::int64_t width = 0;
  std::array<double, 3> mean{};  // in units of 0..1, in RGB order
  std::array<double, 3> std{};
  bool bgr = false;  // the frame's channel order; the result is RGB
};

// frame uint8 [H,W,3] -> float32 [3,h,w] = (bilinear(frame) / 255 - mean) / std.
// Half-pixel centres, no antialiasing, edges clamped. Checks the inputs and returns the shape.
Shape preprocess_shape(const TensorView& frame, const PreprocessParams& params);

void preprocess(const TensorView& frame, const TensorView& out, const PreprocessParams& params,
                StreamHandle stream);

// Arguments are checked and not empty.
ZSSEG_DECLARE_CPU_KERNEL(void preprocess_cpu(const TensorView& frame, const TensorView& out,
                                             const PreprocessParams& params))
void preprocess_cuda(const TensorView& frame, const TensorView& out, const PreprocessParams& params,
                     StreamHandle stream);

}  // namespace zsseg
