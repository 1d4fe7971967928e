// Logits of a coarse grid on a finer one, along the edges of a picture.
#pragma once

#include "zsseg/cpu_dispatch.h"
#include "zsseg/ops/align.h"
#include "zsseg/tensor_view.h"

namespace zsseg {

struct BilateralUpsampleArgs {
  const TensorView& logits;  // float32 [B, C, h, w]
  const TensorView& guide;   // float32 [B, 3, H, W]: the picture on the finer grid
  int scale;                 // points of the finer grid from a cell to the next: 3, 5, 7 or 9
  float reach;               // distance of colours from which on they count as unlike
  Align align;
};

// float32 [B, C, H, W], with H = scale * h, or scale * (h - 1) + 1 where cells lie on corners: the
// mean of the four cells around each point by their bilinear weights times how like the point's
// colour is to theirs, which is the mean over their points. Products and sums are rounded
// separately: CPU and CUDA agree bit for bit. Checks the inputs and returns the result's shape.
Shape bilateral_upsample_shape(const BilateralUpsampleArgs& args);

void bilateral_upsample(const BilateralUpsampleArgs& args, const TensorView& out,
                        StreamHandle stream);

// Arguments are checked and not empty.
ZSSEG_DECLARE_CPU_KERNEL(void bilateral_upsample_cpu(const BilateralUpsampleArgs& args,
                                                     const TensorView& out))
void bilateral_upsample_cuda(const BilateralUpsampleArgs& args, const TensorView& out,
                             StreamHandle stream);

}  // namespace zsseg
