// Colours laid over a window of a picture by weights: letters, and what is around them.
#pragma once

#include "zsseg/cpu_dispatch.h"
#include "zsseg/tensor_view.h"

namespace zsseg {

constexpr int kMostInks = 4;

struct InkParams {
  std::int64_t top = 0, left = 0;  // of the weights in the picture; they may reach beyond it
  std::uint8_t colours[kMostInks][3] = {};
};

// own + weight / 255 * (colour - own), rounded to nearest. There are no ties: 255 is odd.
inline std::uint8_t ink_blend(std::uint32_t own, std::uint32_t colour, std::uint32_t weight) {
  return static_cast<std::uint8_t>((own * (255u - weight) + colour * weight + 127u) / 255u);
}

// picture uint8 [H,W,3], written, on the CPU; weights uint8 [L,h,w] of one to kMostInks colours,
// each laid over those before it.
void ink(const TensorView& picture, const TensorView& weights, const InkParams& params);

// The part of the weights that lies on the picture, not empty: its first row and column and its
// size, all in the weights.
struct InkWindow {
  std::int64_t row, column, height, width;
};

// Arguments are checked.
ZSSEG_DECLARE_CPU_KERNEL(void ink_cpu(const TensorView& picture, const TensorView& weights,
                                      const InkParams& params, const InkWindow& window))

}  // namespace zsseg
