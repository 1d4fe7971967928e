// From a picture to the planes that encoders take: NV12 or I420.
#pragma once

#include "zsseg/cpu_dispatch.h"
#include "zsseg/ops/camera_frame.h"

namespace zsseg {

struct Yuv420Params {
  bool planar = false;  // I420, whose U and V have a plane each; NV12 if not
  bool bgr = false;     // the picture's channel order
  ColourMatrix matrix = ColourMatrix::kBt601;
};

// The planes to write, two of NV12 or three of I420. Their rows may lie further apart than they are
// long.
struct Yuv420Planes {
  TensorView plane[3];
  std::int64_t row_bytes[3];
};

constexpr int yuv420_count(const Yuv420Params& params) {
  return params.planar ? 3 : 2;
}

// image uint8 [H,W,3] -> NV12: [H',W'] and [H'/2,W'/2,2], U then V; I420: [H',W'] and twice
// [H'/2,W'/2], U and V. H' and W' are H and W rounded up to even: the last row and column are
// repeated. A colour is of the mean of its two by two pixels, rounded once.
// Checks the input and returns a plane's shape.
Shape yuv420_shape(const TensorView& image, const Yuv420Params& params, int plane);

void yuv420(const TensorView& image, const Yuv420Planes& out, const Yuv420Params& params,
            StreamHandle stream);

// Arguments are checked.
ZSSEG_DECLARE_CPU_KERNEL(void yuv420_cpu(const TensorView& image, const Yuv420Planes& out,
                                         const Yuv420Params& params))
void yuv420_cuda(const TensorView& image, const Yuv420Planes& out, const Yuv420Params& params,
                 StreamHandle stream);

}  // namespace zsseg
