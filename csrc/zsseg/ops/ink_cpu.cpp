#include <cstdint>

#include "zsseg/ops/ink.h"

namespace zsseg {
namespace ZSSEG_ISA_NAMESPACE {

// A name covers few pixels: one thread.
void ink_cpu(const TensorView& picture, const TensorView& weights, const InkParams& params,
             const InkWindow& window) {
  const std::int64_t width = weights.shape[2], plane = weights.shape[1] * width;
  for (std::int64_t y = 0; y < window.height; ++y) {
    const std::int64_t row = window.row + y;
    const std::uint8_t* from = weights.as<const std::uint8_t>() + row * width + window.column;
    std::uint8_t* to = picture.as<std::uint8_t>() +
                       3 * ((params.top + row) * picture.shape[1] + params.left + window.column);
    for (std::int64_t layer = 0; layer < weights.shape[0]; ++layer) {
      const std::uint8_t* colour = params.colours[layer];
      for (std::int64_t x = 0; x < window.width; ++x) {
        const std::uint32_t weight = from[layer * plane + x];
        for (int channel = 0; channel < 3; ++channel) {
          to[3 * x + channel] = ink_blend(to[3 * x + channel], colour[channel], weight);
        }
      }
    }
  }
}

}  // namespace ZSSEG_ISA_NAMESPACE
}  // namespace zsseg
