// From a picture's pixels to YUV 4:2:0, shared by the CPU and CUDA kernels. All integer: bit-exact
// everywhere.
#pragma once

#include <cstdint>

#include "zsseg/host_device.h"
#include "zsseg/ops/camera_frame.h"
#include "zsseg/ops/yuv420.h"

namespace zsseg {

// Weights of a pixel's three bytes in multiples of 2^-20. Those of U and V sum to about nothing,
// so that grey has no colour.
struct RgbToYuv {
  int black, y[3], u[3], v[3];
};

// The inverse of yuv_to_rgb.
ZSSEG_HOST_DEVICE RgbToYuv rgb_to_yuv(ColourMatrix matrix) {
  switch (matrix) {
    case ColourMatrix::kBt709:
      return {16, {191455, 644068, 65019}, {-105533, -355018, 460551}, {460551, -418321, -42230}};
    case ColourMatrix::kBt601Full:
      return {0, {313524, 615514, 119538}, {-176932, -347356, 524288}, {524288, -439026, -85262}};
    case ColourMatrix::kBt709Full:
      return {0, {222927, 749942, 75707}, {-120138, -404150, 524288}, {524288, -476214, -48074}};
    default:  // OpenCV's BT.601
      return {16, {269484, 528482, 102760}, {-155188, -305135, 460324}, {460324, -385875, -74448}};
  }
}

// For the bytes of BGR, the weights change places.
ZSSEG_HOST_DEVICE RgbToYuv weights_in_order(const RgbToYuv& matrix, bool bgr) {
  const int first = bgr ? 2 : 0, third = 2 - first;
  return {matrix.black,
          {matrix.y[first], matrix.y[1], matrix.y[third]},
          {matrix.u[first], matrix.u[1], matrix.u[third]},
          {matrix.v[first], matrix.v[1], matrix.v[third]}};
}

// Where the planes are, for two by two pixels at a time.
struct Yuv420Pointers {
  std::uint8_t *luma, *u, *v;
  std::int64_t luma_row, u_row, v_row;  // bytes from one row to the next
  int step;                             // from one U or V to the next
};

ZSSEG_HOST_DEVICE Yuv420Pointers yuv420_pointers(const Yuv420Planes& out, bool planar) {
  auto* u = static_cast<std::uint8_t*>(out.plane[1].data);
  return {static_cast<std::uint8_t*>(out.plane[0].data),
          u,
          planar ? static_cast<std::uint8_t*>(out.plane[2].data) : u + 1,
          out.row_bytes[0],
          out.row_bytes[1],
          out.row_bytes[planar ? 2 : 1],
          planar ? 1 : 2};
}

ZSSEG_HOST_DEVICE std::uint32_t luma_of(std::uint32_t first, std::uint32_t second,
                                        std::uint32_t third, const RgbToYuv& matrix) {
  const int scaled = matrix.y[0] * static_cast<int>(first) +
                     matrix.y[1] * static_cast<int>(second) + matrix.y[2] * static_cast<int>(third);
  return static_cast<std::uint32_t>((scaled + (matrix.black << 20) + (1 << 19)) >> 20);
}

// Of the sums of four pixels' bytes. Never below 0: 128 outweighs what weights take away.
ZSSEG_HOST_DEVICE std::uint32_t chroma_of(const std::uint32_t (&sums)[3], const int (&weights)[3]) {
  const int scaled = weights[0] * static_cast<int>(sums[0]) +
                     weights[1] * static_cast<int>(sums[1]) +
                     weights[2] * static_cast<int>(sums[2]);
  const int rounded = (scaled + (128 << 22) + (1 << 21)) >> 22;
  return static_cast<std::uint32_t>(rounded > 255 ? 255 : rounded);
}

}  // namespace zsseg
