// The use of a run of labels in upsample_argmax's CUDA kernel beyond storing them: nothing, or
// blend their colours onto a frame. Included by upsample_argmax_cuda.cu only.
#pragma once

#include <cstdint>

#include "zsseg/cuda_launch.h"
#include "zsseg/ops/overlay_pixel.h"
#include "zsseg/ops/upsample_argmax_block_cuda.h"
#include "zsseg/wide_cuda.h"

namespace zsseg::upsample {
namespace {

struct NoPainting {};

struct Painting {
  const std::uint8_t* frame;    // [out_height, out_width, 3]
  const std::uint8_t* palette;  // [num_colours, 3]
  std::uint8_t* picture;        // [out_height, out_width, 3], may be frame
  std::int64_t num_colours;
  std::uint32_t weight;
  bool aligned;  // both in words of four bytes, and rows are whole runs
};

// A third of the bytes of a run of pixels.
template <int kCount>
struct ThirdOfRun;
template <>
struct ThirdOfRun<4> {
  using Word = std::uint32_t;
};
template <>
struct ThirdOfRun<2> {
  using Word = std::uint16_t;
};

template <typename Label>
__device__ std::uint32_t painted(const Painting& painting, std::uint32_t own, Label label,
                                 int channel) {
  const bool coloured = overlay_has_colour(label, painting.num_colours);
  const std::uint32_t colour = coloured ? painting.palette[3 * std::int64_t{label} + channel] : own;
  return overlay_blend(own, colour, painting.weight);
}

template <typename Label, int kCount>
__device__ void paint_run(const NoPainting& /*painting*/, const Wide<Label, kCount>& /*labels*/,
                          const WarpCell& /*cell*/, int /*x*/, std::int64_t /*at*/) {}

// The pixels that lie in the cell of a run from column `x` and number `at` of the result on.
template <typename Label, int kCount>
__device__ void paint_run(const Painting& painting, const Wide<Label, kCount>& labels,
                          const WarpCell& cell, int x, std::int64_t at) {
  using Word = typename ThirdOfRun<kCount>::Word;
  if (painting.aligned && x >= cell.column_begin && x + kCount <= cell.column_end) {
    const Word* from = reinterpret_cast<const Word*>(painting.frame + 3 * at);
    Word* to = reinterpret_cast<Word*>(painting.picture + 3 * at);
    for (int third = 0; third < 3; ++third) {  // one by one: registers are scarce
      const std::uint32_t own = from[third];
      std::uint32_t mixed = 0;
      for (int i = 0; i < kCount; ++i) {
        const int byte = third * kCount + i;
        mixed |= painted(painting, own >> (8 * i) & 0xffu, labels.value[byte / 3], byte % 3)
                 << (8 * i);
      }
      to[third] = static_cast<Word>(mixed);
    }
    return;
  }
  for (int p = 0; p < kCount; ++p) {
    if (x + p >= cell.column_begin && x + p < cell.column_end) {
      for (int channel = 0; channel < 3; ++channel) {
        const std::int64_t byte = 3 * (at + p) + channel;
        painting.picture[byte] = static_cast<std::uint8_t>(
            painted(painting, painting.frame[byte], labels.value[p], channel));
      }
    }
  }
}

}  // namespace
}  // namespace zsseg::upsample
