// The arithmetic of one cell, shared by the CPU and CUDA kernels. Products and sums are rounded
// separately on every target, so that results are bit-equal everywhere.
#pragma once

#include <cstdint>

#include "zsseg/host_device.h"
#include "zsseg/ops/upsample_argmax_math.h"

namespace zsseg::warp {

// Between which two cells of an axis a position lies.
struct AxisTap {
  std::int32_t lower;
  std::int32_t upper;
  float t;  // weight of the upper one
};

// Positions are in cells, cell centres at whole numbers: the grid ends half a cell beyond the
// outermost centres. False for NaN.
ZSSEG_HOST_DEVICE bool is_inside(float position, std::int32_t size) {
  return position >= -0.5f && position <= static_cast<float>(size) - 0.5f;
}

// Caller guarantees: the position is inside.
ZSSEG_HOST_DEVICE AxisTap axis_tap(float position, std::int32_t size) {
  const auto last = static_cast<float>(size - 1);
  const float clamped = position < 0.0f ? 0.0f : (position > last ? last : position);
  const auto lower = static_cast<std::int32_t>(clamped);
  return {lower, lower + 1 < size ? lower + 1 : lower, clamped - static_cast<float>(lower)};
}

// Where a cell's past lies in a plane [h, w], and how much of it counts; `weight` 0: none of it.
struct CellTap {
  std::int32_t corner[4];  // top left, top right, bottom left, bottom right
  float tx;
  float ty;
  float weight;
};

ZSSEG_HOST_DEVICE CellTap cell_tap(std::int32_t x, std::int32_t y, std::int32_t width,
                                   std::int32_t height, float flow_x, float flow_y, float weight) {
  const float from_x = upsample::add(static_cast<float>(x), flow_x);
  const float from_y = upsample::add(static_cast<float>(y), flow_y);
  const std::int32_t here = y * width + x;
  if (!(weight > 0.0f) || !is_inside(from_x, width) || !is_inside(from_y, height)) {
    return {{here, here, here, here}, 0.0f, 0.0f, 0.0f};
  }
  const AxisTap column = axis_tap(from_x, width);
  const AxisTap row = axis_tap(from_y, height);
  return {{row.lower * width + column.lower, row.lower * width + column.upper,
           row.upper * width + column.lower, row.upper * width + column.upper},
          column.t,
          row.t,
          weight < 1.0f ? weight : 1.0f};
}

// Down the rows, then along them, as upsample_argmax samples.
ZSSEG_HOST_DEVICE float blend(float logit, float top_left, float top_right, float bottom_left,
                              float bottom_right, float tx, float ty, float weight) {
  using upsample::mix;
  const float left = mix(1.0f - ty, top_left, ty, bottom_left);
  const float right = mix(1.0f - ty, top_right, ty, bottom_right);
  const float past = mix(1.0f - tx, left, tx, right);
  const float blended = mix(1.0f - weight, logit, weight, past);
  return weight > 0.0f ? blended : logit;
}

}  // namespace zsseg::warp
