// From a pixel of NV12 to RGB, shared by the CPU and CUDA kernels.
#pragma once

#include <cstdint>

#include "zsseg/host_device.h"
#include "zsseg/ops/camera_frame.h"

namespace zsseg {

// From NV12 to RGB in multiples of 2^-20, so that all implementations agree in every bit.
struct YuvToRgb {
  int black, y, v_red, u_green, v_green, u_blue;
};

ZSSEG_HOST_DEVICE YuvToRgb yuv_to_rgb(ColourMatrix matrix) {
  switch (matrix) {
    case ColourMatrix::kBt709:
      return {16, 1220945, 1879825, -223607, -558796, 2215014};
    case ColourMatrix::kBt601Full:
      return {0, 1048576, 1470104, -360853, -748826, 1858077};
    case ColourMatrix::kBt709Full:
      return {0, 1048576, 1651297, -196424, -490864, 1945738};
    default:
      return {16, 1220542, 1673527, -409993, -852492, 2116026};  // OpenCV's BT.601
  }
}

ZSSEG_HOST_DEVICE std::uint32_t yuv_byte(int scaled) {
  const int rounded = (scaled + (1 << 19)) >> 20;
  return static_cast<std::uint32_t>(rounded < 0 ? 0 : (rounded > 255 ? 255 : rounded));
}

// Red in the low byte, then green, then blue: as the bytes of an RGB frame lie.
ZSSEG_HOST_DEVICE std::uint32_t yuv_word(int y, int u, int v, const YuvToRgb& matrix) {
  const int luma = (y > matrix.black ? y - matrix.black : 0) * matrix.y;
  u -= 128;
  v -= 128;
  return yuv_byte(luma + matrix.v_red * v) |
         yuv_byte(luma + matrix.u_green * u + matrix.v_green * v) << 8 |
         yuv_byte(luma + matrix.u_blue * u) << 16;
}

}  // namespace zsseg
