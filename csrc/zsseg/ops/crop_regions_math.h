// The arithmetic of crop_regions, one element at a time, shared by the CPU and CUDA kernels.
// Whether a pixel is inside a mask is bit-equal everywhere: products and sums round separately.
#pragma once

#include <cmath>
#include <cstdint>

#include "zsseg/host_device.h"
#include "zsseg/ops/upsample_argmax_math.h"

namespace zsseg::regions {

enum class Style : int {
  kCropMask = 0,  // the box; pixels outside the mask are zero
  kCrop = 1,      // the box
  kMask = 2,      // the whole image; pixels outside the mask are zero
};

// Mask logits on their grid, and the canvas that they are upsampled to.
struct MaskGrid {
  int height, width;
  int canvas_height, canvas_width;
};

ZSSEG_HOST_DEVICE upsample::CellPosition mask_row(const MaskGrid& grid, int y) {
  return upsample::cell_position(y, grid.height, grid.canvas_height);
}

ZSSEG_HOST_DEVICE upsample::CellPosition mask_column(const MaskGrid& grid, int x) {
  return upsample::cell_position(x, grid.width, grid.canvas_width);
}

// The logits around a place on their grid: top left, top right, bottom left, bottom right.
ZSSEG_HOST_DEVICE void load_corners(const float* logits,  // [height, width]
                                    const MaskGrid& grid, int row_cell, int column_cell,
                                    float (&corner)[4]) {
  const int right = grid.width > 1 ? 1 : 0;
  const float* above = logits + std::int64_t{row_cell} * grid.width + column_cell;
  const float* below = above + (grid.height > 1 ? grid.width : 0);
  corner[0] = above[0];
  corner[1] = above[right];
  corner[2] = below[0];
  corner[3] = below[right];
}

ZSSEG_HOST_DEVICE float blend_corners(const float (&corner)[4], const upsample::CellPosition& row,
                                      const upsample::CellPosition& column) {
  return upsample::bilinear(corner, 1.0f - row.t, row.t, 1.0f - column.t, column.t);
}

ZSSEG_HOST_DEVICE float mask_logit(const float* logits,  // [height, width]
                                   const MaskGrid& grid, const upsample::CellPosition& row,
                                   const upsample::CellPosition& column) {
  float corner[4];
  load_corners(logits, grid, row.cell, column.cell, corner);
  return blend_corners(corner, row, column);
}

ZSSEG_HOST_DEVICE float mask_logit(const float* logits, const MaskGrid& grid, int y, int x) {
  return mask_logit(logits, grid, mask_row(grid, y), mask_column(grid, x));
}

// One axis of RoIAlign: `side` bins over [start, end], each the mean of num_samples linear samples.
struct BinAxis {
  float start;   // in pixel centres
  float length;  // of a bin
  int num_samples;
  int last;  // pixel of the axis
};

ZSSEG_HOST_DEVICE BinAxis bin_axis(int start, int end, int side, int size) {
  const int num_samples = (end - start + side - 1) / side;
  return {static_cast<float>(start) - 0.5f,
          static_cast<float>(end - start) / static_cast<float>(side),
          num_samples > 1 ? num_samples : 1, size - 1};
}

// A sample lies between pixels lower and upper: (1-t)*lower + t*upper.
struct BinSample {
  int lower;
  int upper;
  float t;
};

// float32 in this order of operations: on long boxes another order moves samples by 1e-4 pixels.
ZSSEG_HOST_DEVICE BinSample bin_sample(const BinAxis& axis, int bin, int sample) {
  const float within =
      upsample::multiply(static_cast<float>(sample) + 0.5f, axis.length) / axis.num_samples;
  float at = upsample::add(
      upsample::add(axis.start, upsample::multiply(static_cast<float>(bin), axis.length)), within);
  at = at < 0.0f ? 0.0f : (at > axis.last ? static_cast<float>(axis.last) : at);
  const int lower = static_cast<int>(at);
  return {lower, lower < axis.last ? lower + 1 : axis.last, at - static_cast<float>(lower)};
}

// Style kMask: is pixel (row, column) of the side x side image inside the mask? The logits on the
// canvas are resized once more before they are compared with zero.
ZSSEG_HOST_DEVICE bool inside_resized_mask(const float* logits, const MaskGrid& grid, int side,
                                           int row, int column) {
  const upsample::CellPosition y = upsample::cell_position(row, grid.canvas_height, side);
  const upsample::CellPosition x = upsample::cell_position(column, grid.canvas_width, side);
  const int below = y.cell + (grid.canvas_height > 1 ? 1 : 0);
  const int right = x.cell + (grid.canvas_width > 1 ? 1 : 0);
  const float corner[4] = {
      mask_logit(logits, grid, y.cell, x.cell), mask_logit(logits, grid, y.cell, right),
      mask_logit(logits, grid, below, x.cell), mask_logit(logits, grid, below, right)};
  return upsample::bilinear(corner, 1.0f - y.t, y.t, 1.0f - x.t, x.t) > 0.0f;
}

// Style kMask: the image's plane resized to side x side.
ZSSEG_HOST_DEVICE float resized_pixel(const float* plane,  // [height, width]
                                      int height, int width, int side, int row, int column) {
  const upsample::CellPosition y = upsample::cell_position(row, height, side);
  const upsample::CellPosition x = upsample::cell_position(column, width, side);
  const int right = x.cell + (width > 1 ? 1 : 0);
  const float* above = plane + std::int64_t{y.cell} * width;
  const float* below = above + (height > 1 ? width : 0);
  const float corner[4] = {above[x.cell], above[right], below[x.cell], below[right]};
  return upsample::bilinear(corner, 1.0f - y.t, y.t, 1.0f - x.t, x.t);
}

}  // namespace zsseg::regions
