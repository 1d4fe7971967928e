// Palette and alpha blend of labels onto a frame.
#pragma once

#include "zsseg/cpu_dispatch.h"
#include "zsseg/ops/camera_frame.h"

namespace zsseg {

struct OverlayParams {
  double alpha = 0.5;  // weight of the palette's colour, in [0, 1]
  // Of an NV12 frame: how it becomes RGB, and whether the result is in the order of BGR.
  ColourMatrix matrix = ColourMatrix::kBt601;
  bool bgr = false;
};

// frame uint8 [H,W,3] or NV12, labels uint8 or uint16 [H,W], palette uint8 [K,3] -> uint8 [H,W,3].
// NV12 becomes RGB, rounded to bytes, before colours are laid over it.
// Pixels whose label is unknown (255, 65535) or has no row in the palette stay the frame's.
// Checks the inputs and returns the result's shape.
Shape overlay_shape(const CameraFrame& frame, const TensorView& labels, const TensorView& palette,
                    const OverlayParams& params);

// As above into `out`, which may be a frame of three bytes a pixel itself.
void overlay(const CameraFrame& frame, const TensorView& labels, const TensorView& palette,
             const TensorView& out, const OverlayParams& params, StreamHandle stream);

// Arguments are checked and not empty.
ZSSEG_DECLARE_CPU_KERNEL(void overlay_cpu(const CameraFrame& frame, const TensorView& labels,
                                          const TensorView& palette, const TensorView& out,
                                          const OverlayParams& params))
void overlay_cuda(const CameraFrame& frame, const TensorView& labels, const TensorView& palette,
                  const TensorView& out, const OverlayParams& params, StreamHandle stream);

}  // namespace zsseg
