#include <cstdint>

#include "zsseg/ops/yuv420.h"
#include "zsseg/ops/yuv420_pixel.h"
#include "zsseg/thread_pool.h"

namespace zsseg {
namespace ZSSEG_ISA_NAMESPACE {
namespace {

constexpr std::int64_t kGrainPixels = 1 << 15;  // about 50 us of work

// Two rows of brightness and one of colour.
void yuv420_rows(const std::uint8_t* upper, const std::uint8_t* lower, std::int64_t width,
                 std::int64_t row, const Yuv420Pointers& to, const RgbToYuv& matrix) {
  std::uint8_t* luma = to.luma + 2 * row * to.luma_row;
  for (std::int64_t x = 0; x < width; x += 2) {
    const std::int64_t right = x + 1 < width ? x + 1 : x;
    const std::uint8_t* pixels[4] = {upper + 3 * x, upper + 3 * right, lower + 3 * x,
                                     lower + 3 * right};
    std::uint32_t sums[3] = {0, 0, 0};
    for (int i = 0; i < 4; ++i) {
      const std::uint8_t* pixel = pixels[i];
      luma[i / 2 * to.luma_row + x + i % 2] =
          static_cast<std::uint8_t>(luma_of(pixel[0], pixel[1], pixel[2], matrix));
      for (int channel = 0; channel < 3; ++channel) {
        sums[channel] += pixel[channel];
      }
    }
    const std::int64_t at = x / 2 * to.step;
    to.u[row * to.u_row + at] = static_cast<std::uint8_t>(chroma_of(sums, matrix.u));
    to.v[row * to.v_row + at] = static_cast<std::uint8_t>(chroma_of(sums, matrix.v));
  }
}

}  // namespace

void yuv420_cpu(const TensorView& image, const Yuv420Planes& out, const Yuv420Params& params) {
  const std::int64_t height = image.shape[0], width = image.shape[1];
  const Yuv420Pointers to = yuv420_pointers(out, params.planar);
  const RgbToYuv matrix = weights_in_order(rgb_to_yuv(params.matrix), params.bgr);
  parallel_for(
      0, (height + 1) / 2, kGrainPixels / width + 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row) {
          const std::int64_t below = 2 * row + 1 < height ? 2 * row + 1 : 2 * row;
          const auto* pixels = image.as<const std::uint8_t>();
          yuv420_rows(pixels + 6 * row * width, pixels + 3 * below * width, width, row, to, matrix);
        }
      });
}

}  // namespace ZSSEG_ISA_NAMESPACE
}  // namespace zsseg
