// Frames as cameras and decoders deliver them: three bytes a pixel, or NV12.
#pragma once

#include "zsseg/tensor_view.h"

namespace zsseg {

constexpr std::int64_t kMaxSide = 32767;  // longest side of frames and results

// ITU-R's two ways from a camera's brightness and colour to RGB, of limited range and of full.
enum class ColourMatrix { kBt601, kBt709, kBt601Full, kBt709Full };

// A frame of a camera: uint8 [H,W,3], or NV12: brightness uint8 [H,W] with even sides, and
// colour uint8 [H/2,W/2,2], U then V of every two by two pixels.
struct CameraFrame {
  TensorView pixels;
  const TensorView* chroma = nullptr;
  // Of NV12: bytes from one row of a plane to the next, at least W; 0 means W.
  std::int64_t luma_row_bytes = 0;
  std::int64_t chroma_row_bytes = 0;

  std::int64_t luma_row() const { return luma_row_bytes == 0 ? pixels.shape[1] : luma_row_bytes; }
  std::int64_t chroma_row() const {
    return chroma_row_bytes == 0 ? pixels.shape[1] : chroma_row_bytes;
  }
};

// Refuses planes that are no NV12 frame, and sides beyond kMaxSide.
void expect_planes(const CameraFrame& frame);

// Refuses sides beyond kMaxSide, and none.
void expect_sides(const char* name, const TensorView& pixels);

}  // namespace zsseg
