#include <algorithm>
#include <cstdint>

#include "zsseg/cuda_launch.h"
#include "zsseg/cuda_raii.h"
#include "zsseg/ops/crop_regions.h"

namespace zsseg {
namespace {

using regions::BinAxis;
using regions::BinSample;
using regions::MaskGrid;
using regions::Style;

constexpr int kBoundThreads = 256;
constexpr int kBlockX = 32;
constexpr int kBlockY = 8;

// What differs between the regions of one launch; small enough for a launch's parameters.
struct Regions {
  std::int32_t mask[kMaxCropRegions];
  std::int32_t box[kMaxCropRegions][4];
};

struct Planes {
  float scale[3];
  float offset[3];
};

// One block a mask; threads stride over the canvas. Bound by arithmetic: one bilinear value a
// pixel. Caller guarantees: grid.x is the number of masks.
__global__ void mask_boxes_kernel(const float* __restrict__ mask_logits,  // [Q, height, width]
                                  std::int32_t* __restrict__ boxes,       // [Q, 5]
                                  MaskGrid grid) {
  __shared__ std::int32_t found[5];  // x1, y1, x2, y2, count
  if (threadIdx.x < 5) {
    const std::int32_t start[5] = {grid.canvas_width, grid.canvas_height, -1, -1, 0};
    found[threadIdx.x] = start[threadIdx.x];
  }
  __syncthreads();
  const float* logits = mask_logits + std::int64_t{blockIdx.x} * grid.height * grid.width;
  std::int32_t x1 = grid.canvas_width, y1 = grid.canvas_height, x2 = -1, y2 = -1, count = 0;
  const int pixels = grid.canvas_height * grid.canvas_width;
  for (int pixel = threadIdx.x; pixel < pixels; pixel += kBoundThreads) {
    const int y = pixel / grid.canvas_width;
    const int x = pixel % grid.canvas_width;
    if (regions::mask_logit(logits, grid, y, x) > 0.0f) {
      ++count;
      x1 = min(x1, x);
      x2 = max(x2, x);
      y1 = min(y1, y);
      y2 = max(y2, y);
    }
  }
  if (count > 0) {
    atomicMin(&found[0], x1);
    atomicMin(&found[1], y1);
    atomicMax(&found[2], x2);
    atomicMax(&found[3], y2);
    atomicAdd(&found[4], count);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const bool degenerate = found[2] <= found[0] || found[3] <= found[1];
    std::int32_t* box = boxes + 5 * std::int64_t{blockIdx.x};
    box[0] = degenerate ? 0 : found[0];
    box[1] = degenerate ? 0 : found[1];
    box[2] = degenerate ? grid.canvas_width : found[2];
    box[3] = degenerate ? grid.canvas_height : found[3];
    box[4] = found[4];
  }
}

// Mean of the samples of one bin, all three planes.
__device__ void sample_bin(const float* __restrict__ image, const float* __restrict__ logits,
                           const MaskGrid& grid, const BinAxis& rows, const BinAxis& columns,
                           int row, int column, bool masked, const Planes& planes, float value[3]) {
  const std::int64_t plane_size = std::int64_t{grid.canvas_height} * grid.canvas_width;
  for (int i = 0; i < rows.num_samples; ++i) {
    const BinSample down = regions::bin_sample(rows, row, i);
    for (int k = 0; k < columns.num_samples; ++k) {
      const BinSample across = regions::bin_sample(columns, column, k);
      for (int corner = 0; corner < 4; ++corner) {
        const int y = corner < 2 ? down.lower : down.upper;
        const int x = corner % 2 == 0 ? across.lower : across.upper;
        const float weight =
            (corner < 2 ? 1.0f - down.t : down.t) * (corner % 2 == 0 ? 1.0f - across.t : across.t);
        if (weight == 0.0f || (masked && !(regions::mask_logit(logits, grid, y, x) > 0.0f))) {
          continue;
        }
        const float* pixel = image + std::int64_t{y} * grid.canvas_width + x;
        for (int plane = 0; plane < 3; ++plane) {
          value[plane] +=
              weight * (pixel[plane * plane_size] * planes.scale[plane] + planes.offset[plane]);
        }
      }
    }
  }
  const float scale = 1.0f / static_cast<float>(rows.num_samples * columns.num_samples);
  for (int plane = 0; plane < 3; ++plane) {
    value[plane] *= scale;
  }
}

// One thread a pixel of a crop, all three planes. Bound by the mask's bilinear values: four taps a
// sample. Caller guarantees: grid.z is the number of regions, boxes lie within the canvas.
__global__ void crop_regions_kernel(const float* __restrict__ image,        // [3, H, W]
                                    const float* __restrict__ mask_logits,  // [Q, h, w]
                                    float* __restrict__ out,                // [R, 3, side, side]
                                    MaskGrid grid, Regions regions_of, Planes planes, int side,
                                    Style style) {
  const int column = blockIdx.x * kBlockX + threadIdx.x;
  const int row = blockIdx.y * kBlockY + threadIdx.y;
  if (column >= side || row >= side) {
    return;
  }
  const int region = blockIdx.z;
  const float* logits =
      mask_logits + std::int64_t{regions_of.mask[region]} * grid.height * grid.width;
  const std::int64_t plane_size = std::int64_t{grid.canvas_height} * grid.canvas_width;
  float value[3] = {0.0f, 0.0f, 0.0f};
  if (style == Style::kMask) {
    if (regions::inside_resized_mask(logits, grid, side, row, column)) {
      for (int plane = 0; plane < 3; ++plane) {
        value[plane] = regions::resized_pixel(image + plane * plane_size, grid.canvas_height,
                                              grid.canvas_width, side, row, column) *
                           planes.scale[plane] +
                       planes.offset[plane];
      }
    }
  } else {
    const std::int32_t* box = regions_of.box[region];
    const BinAxis rows = regions::bin_axis(box[1], box[3], side, grid.canvas_height);
    const BinAxis columns = regions::bin_axis(box[0], box[2], side, grid.canvas_width);
    sample_bin(image, logits, grid, rows, columns, row, column, style == Style::kCropMask, planes,
               value);
  }
  float* to = out + (std::int64_t{region} * 3 * side + row) * side + column;
  for (int plane = 0; plane < 3; ++plane) {
    to[std::int64_t{plane} * side * side] = value[plane];
  }
}

MaskGrid mask_grid(const TensorView& mask_logits, std::int64_t height, std::int64_t width) {
  return {static_cast<int>(mask_logits.shape[1]), static_cast<int>(mask_logits.shape[2]),
          static_cast<int>(height), static_cast<int>(width)};
}

}  // namespace

void mask_boxes_cuda(const TensorView& mask_logits, const TensorView& boxes, std::int64_t height,
                     std::int64_t width, StreamHandle stream) {
  const DeviceGuard guard(boxes.device.index);
  const auto num_masks = static_cast<unsigned>(mask_logits.shape[0]);
  launch("mask_boxes_kernel", mask_boxes_kernel, {num_masks, kBoundThreads}, to_stream(stream),
         mask_logits.as<const float>(), boxes.as<std::int32_t>(),
         mask_grid(mask_logits, height, width));
}

void crop_regions_cuda(const TensorView& image, const TensorView& mask_logits,
                       const TensorView& regions, const TensorView& boxes, const TensorView& out,
                       const CropRegionsParams& params, StreamHandle stream) {
  const DeviceGuard guard(out.device.index);
  Regions of{};
  std::copy_n(regions.as<const std::int32_t>(), regions.shape[0], of.mask);
  std::copy_n(boxes.as<const std::int32_t>(), boxes.count(), &of.box[0][0]);
  Planes planes{};
  for (int plane = 0; plane < 3; ++plane) {
    planes.scale[plane] = static_cast<float>(params.scale[plane]);
    planes.offset[plane] = static_cast<float>(params.offset[plane]);
  }
  const int side = static_cast<int>(params.side);
  const dim3 block(kBlockX, kBlockY);
  const dim3 grid((side + kBlockX - 1) / kBlockX, (side + kBlockY - 1) / kBlockY,
                  static_cast<unsigned>(regions.shape[0]));
  launch("crop_regions_kernel", crop_regions_kernel, {grid, block}, to_stream(stream),
         image.as<const float>(), mask_logits.as<const float>(), out.as<float>(),
         mask_grid(mask_logits, image.shape[1], image.shape[2]), of, planes, side, params.style);
}

}  // namespace zsseg
