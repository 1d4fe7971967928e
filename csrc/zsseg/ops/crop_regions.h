// The view of each proposed region for CLIP: boxes around masks, and their crops.
#pragma once

#include "zsseg/cpu_dispatch.h"
#include "zsseg/ops/crop_regions_math.h"
#include "zsseg/tensor_view.h"

namespace zsseg {

constexpr std::int64_t kMaxCanvasSide = 4096;  // bounds what a CPU thread holds on its stack
constexpr std::int64_t kMaxCropSide = 1024;
constexpr std::int64_t kMaxCropRegions = 64;  // boxes travel to CUDA in a launch's parameters

struct CropRegionsParams {
  std::int64_t side = 0;  // of the crops
  regions::Style style = regions::Style::kCropMask;
  double scale[3] = {1.0, 1.0, 1.0};
  double offset[3] = {0.0, 0.0, 0.0};
};

// mask_logits float32 [Q,h,w], finite -> boxes int32 [Q,5]: x1, y1, x2, y2 and the number of pixels
// whose logit, upsampled to the canvas (half-pixel centres, edges clamped), is above zero. The box
// holds the first and last such column and row; it is 0, 0, width, height where the mask is empty
// or a single pixel wide or high.
Shape mask_boxes_shape(const TensorView& mask_logits, std::int64_t height, std::int64_t width);
void mask_boxes(const TensorView& mask_logits, const TensorView& boxes, std::int64_t height,
                std::int64_t width, StreamHandle stream);

// image float32 [3,H,W], mask_logits float32 [Q,h,w], regions int32 [R] (which masks), boxes int32
// [R,4] of these regions, or [Q,5] of every mask as mask_boxes writes them -> [R,3,side,side].
// regions and boxes are host arrays wherever the others are; or both are on the device of the
// others, boxes [Q,5], and what they hold is not checked: indices and corners outside are moved
// inside. A pixel is image * scale + offset, or zero where the style hides it.
Shape crop_regions_shape(const TensorView& image, const TensorView& mask_logits,
                         const TensorView& regions, const TensorView& boxes,
                         const CropRegionsParams& params);
void crop_regions(const TensorView& image, const TensorView& mask_logits, const TensorView& regions,
                  const TensorView& boxes, const TensorView& out, const CropRegionsParams& params,
                  StreamHandle stream);

// Arguments are checked and not empty; host boxes are [R,4], boxes on the device [Q,5].
ZSSEG_DECLARE_CPU_KERNEL(void mask_boxes_cpu(const TensorView& mask_logits, const TensorView& boxes,
                                             std::int64_t height, std::int64_t width))
void mask_boxes_cuda(const TensorView& mask_logits, const TensorView& boxes, std::int64_t height,
                     std::int64_t width, StreamHandle stream);
ZSSEG_DECLARE_CPU_KERNEL(void crop_regions_cpu(
    const TensorView& image, const TensorView& mask_logits, const TensorView& regions,
    const TensorView& boxes, const TensorView& out, const CropRegionsParams& params))
void crop_regions_cuda(const TensorView& image, const TensorView& mask_logits,
                       const TensorView& regions, const TensorView& boxes, const TensorView& out,
                       const CropRegionsParams& params, StreamHandle stream);

}  // namespace zsseg
