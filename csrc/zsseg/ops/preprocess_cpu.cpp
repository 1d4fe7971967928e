#include <cstdint>

#include "zsseg/ops/preprocess.h"
#include "zsseg/ops/preprocess_pixel.h"
#include "zsseg/thread_pool.h"

namespace zsseg {
namespace ZSSEG_ISA_NAMESPACE {
namespace {

constexpr int kBlockColumns = 128;
constexpr std::int64_t kGrainPixels = 1 << 14;  // about 50 us of work

// Taps of a block of result columns, as byte offsets into a row of the frame.
struct ColumnTaps {
  std::uint32_t lower[kBlockColumns];
  std::uint32_t upper[kBlockColumns];
  float t[kBlockColumns];
};

typedef std::uint32_t __attribute__((may_alias, aligned(1))) UnalignedWord;

// The three bytes of a pixel in the low bits. A whole word is read, one byte past the pixel, so the
// frame's last pixel is read from one byte before and shifted.
inline std::uint32_t pixel_word(const std::uint8_t* pixel, const std::uint8_t* last_pixel) {
  if (pixel == last_pixel) {
    return pixel[0] | std::uint32_t{pixel[1]} << 8 | std::uint32_t{pixel[2]} << 16;
  }
  return *reinterpret_cast<const UnalignedWord*>(pixel);
}

inline void load_words(const std::uint8_t* row, const std::uint32_t* offsets, int count,
                       const std::uint8_t* last_pixel, std::uint32_t* words) {
  for (int column = 0; column < count; ++column) {
    words[column] = pixel_word(row + offsets[column], last_pixel);
  }
}

inline float channel_of(std::uint32_t word, int shift) {
  return static_cast<float>(static_cast<std::int32_t>((word >> shift) & 0xffu));
}

// One block of one result row, all three planes.
void preprocess_block(const std::uint8_t* upper_row, const std::uint8_t* lower_row, float ty,
                      const ColumnTaps& taps, int count, const std::uint8_t* last_pixel,
                      const PlaneTransform& transform,
                      float* out,  // [3, plane_stride], at the block
                      std::int64_t plane_stride) {
  std::uint32_t words[4][kBlockColumns];
  load_words(upper_row, taps.lower, count, last_pixel, words[0]);
  load_words(upper_row, taps.upper, count, last_pixel, words[1]);
  load_words(lower_row, taps.lower, count, last_pixel, words[2]);
  load_words(lower_row, taps.upper, count, last_pixel, words[3]);
  for (int plane = 0; plane < 3; ++plane) {
    const int shift = 8 * transform.source[plane];
    const float scale = transform.scale[plane];
    const float offset = transform.shift[plane];
    float* plane_out = out + plane * plane_stride;
    for (int column = 0; column < count; ++column) {
      const float t = taps.t[column];
      const float above =
          lerp(channel_of(words[0][column], shift), channel_of(words[1][column], shift), t);
      const float below =
          lerp(channel_of(words[2][column], shift), channel_of(words[3][column], shift), t);
      plane_out[column] = lerp(above, below, ty) * scale + offset;
    }
  }
}

ColumnTaps column_taps(std::int64_t first, int count, std::int64_t source, std::int64_t target) {
  ColumnTaps taps;
  for (int column = 0; column < count; ++column) {
    const BilinearTap tap =
        bilinear_tap(static_cast<std::uint32_t>(first + column), static_cast<std::uint32_t>(source),
                     static_cast<std::uint32_t>(target));
    taps.lower[column] = 3 * tap.lower;
    taps.upper[column] = 3 * tap.upper;
    taps.t[column] = tap.t;
  }
  return taps;
}

}  // namespace

void preprocess_cpu(const TensorView& frame, const TensorView& out,
                    const PreprocessParams& params) {
  const std::int64_t height = frame.shape[0];
  const std::int64_t width = frame.shape[1];
  const auto* pixels = frame.as<const std::uint8_t>();
  const std::uint8_t* last_pixel = pixels + 3 * (height * width - 1);
  const PlaneTransform transform = plane_transform(params);
  const std::int64_t plane_stride = params.height * params.width;
  parallel_for(
      0, params.height, kGrainPixels / params.width + 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t first = 0; first < params.width; first += kBlockColumns) {
          const std::int64_t left = params.width - first;
          const int count = left < kBlockColumns ? static_cast<int>(left) : kBlockColumns;
          const ColumnTaps taps = column_taps(first, count, width, params.width);
          for (std::int64_t y = begin; y < end; ++y) {
            const BilinearTap row =
                bilinear_tap(static_cast<std::uint32_t>(y), static_cast<std::uint32_t>(height),
                             static_cast<std::uint32_t>(params.height));
            preprocess_block(pixels + 3 * width * row.lower, pixels + 3 * width * row.upper, row.t,
                             taps, count, last_pixel, transform,
                             out.as<float>() + y * params.width + first, plane_stride);
          }
        }
      });
}

}  // namespace ZSSEG_ISA_NAMESPACE
}  // namespace zsseg
