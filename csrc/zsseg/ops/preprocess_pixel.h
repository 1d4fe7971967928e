// The arithmetic of one pixel, shared by the CPU and CUDA kernels.
#pragma once

#include <cstdint>

#include "zsseg/host_device.h"
#include "zsseg/ops/nv12_pixel.h"
#include "zsseg/ops/preprocess.h"

namespace zsseg {

// Where a result pixel lies between two source pixels along one axis: value = (1-t)*lower +
// t*upper.
struct BilinearTap {
  std::uint32_t lower;
  std::uint32_t upper;
  float t;
};

// The tap of (index + 0.5) * source / target - 0.5, clamped; for corners, of index * (source - 1) /
// (target - 1). Beyond the target, that of the edge. In integers, so that index and fraction are
// exact; both sizes are at most kMaxSide, the index at most twice that, so that products stay in 32
// bits.
ZSSEG_HOST_DEVICE BilinearTap bilinear_tap(std::uint32_t index, std::uint32_t source,
                                           std::uint32_t target, Align align) {
  std::uint32_t offset = index * (source - 1u), unit = target > 1u ? target - 1u : 1u;
  if (align == Align::kHalfPixel) {
    const std::uint32_t centre = (2u * index + 1u) * source;  // in units of 1 / (2 * target)
    if (centre <= target) {
      return {0u, 0u, 0.0f};
    }
    offset = centre - target;
    unit = 2u * target;
  }
  const std::uint32_t lower = offset / unit;
  if (lower + 1u >= source) {
    return {source - 1u, source - 1u, 0.0f};
  }
  return {lower, lower + 1u, static_cast<float>(offset % unit) / static_cast<float>(unit)};
}

// (1-t)*a + t*b, not a + t*(b-a): exact at both ends and monotone under rounding.
ZSSEG_HOST_DEVICE float lerp(float a, float b, float t) {
  return (1.0f - t) * a + t * b;
}

// value * scale + shift = (value / 255 - mean) / std, by RGB plane; `source` is the plane's channel
// in the frame.
struct PlaneTransform {
  float scale[3];
  float shift[3];
  int source[3];
};

inline PlaneTransform plane_transform(const PreprocessParams& params) {
  PlaneTransform transform;
  for (int plane = 0; plane < 3; ++plane) {
    transform.scale[plane] = static_cast<float>(1.0 / (255.0 * params.std[plane]));
    transform.shift[plane] = static_cast<float>(-params.mean[plane] / params.std[plane]);
    transform.source[plane] = params.bgr ? 2 - plane : plane;
  }
  return transform;
}

}  // namespace zsseg
