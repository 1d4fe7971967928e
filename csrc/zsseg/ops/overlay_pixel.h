// The arithmetic of one pixel, shared by the CPU and CUDA kernels. All integer: bit-exact
// everywhere.
#pragma once

#include <cstdint>

#include "zsseg/host_device.h"

namespace zsseg {

// alpha as a multiple of 2^-16. 16 bits keep the rounded blend equal to the real-valued one but for
// ties, and every product in 32 bits.
ZSSEG_HOST_DEVICE std::uint32_t overlay_weight(double alpha) {
  return static_cast<std::uint32_t>(alpha * 65536.0 + 0.5);
}

// frame + alpha * (colour - frame), rounded to nearest, ties up.
ZSSEG_HOST_DEVICE std::uint8_t overlay_blend(std::uint32_t frame, std::uint32_t colour,
                                             std::uint32_t weight) {
  return static_cast<std::uint8_t>((frame * (65536u - weight) + colour * weight + 32768u) >> 16);
}

// Whether a label has a colour. The largest value of the label's type means unknown.
template <typename Label>
ZSSEG_HOST_DEVICE bool overlay_has_colour(Label label, std::int64_t num_colours) {
  return label < num_colours && label != static_cast<Label>(~Label{0});
}

}  // namespace zsseg
