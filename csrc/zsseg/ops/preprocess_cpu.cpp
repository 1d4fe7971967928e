#include <cstdint>
#include <type_traits>

#include "zsseg/dtype_dispatch.h"
#include "zsseg/ops/preprocess.h"
#include "zsseg/ops/preprocess_pixel.h"
#include "zsseg/thread_pool.h"

namespace zsseg {
namespace ZSSEG_ISA_NAMESPACE {
namespace {

constexpr int kBlockColumns = 128;
constexpr std::int64_t kGrainPixels = 1 << 14;  // about 50 us of work

// Taps of a block of result columns, as byte offsets into a row of the frame's pixels.
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

// Rows of a frame, whose pixels are turned into words of red, green and blue, or as they lie.
struct Source {
  const std::uint8_t* pixels;
  const std::uint8_t* chroma;  // null: three bytes a pixel
  std::int64_t row_bytes, chroma_row_bytes;
  const std::uint8_t* last_pixel;
  YuvToRgb matrix;
};

void load_row(const Source& source, std::uint32_t row, const std::uint32_t* offsets, int count,
              std::uint32_t* words) {
  const std::uint8_t* pixels = source.pixels + source.row_bytes * row;
  if (source.chroma == nullptr) {
    load_words(pixels, offsets, count, source.last_pixel, words);
    return;
  }
  const std::uint8_t* chroma = source.chroma + source.chroma_row_bytes * (row / 2);
  for (int column = 0; column < count; ++column) {
    const std::uint8_t* uv = chroma + (offsets[column] & ~1u);
    words[column] = yuv_word(pixels[offsets[column]], uv[0], uv[1], source.matrix);
  }
}

inline float channel_of(std::uint32_t word, int shift) {
  return static_cast<float>(static_cast<std::int32_t>((word >> shift) & 0xffu));
}

inline void narrow(float value, Half& to) {
  to = float_to_half(value);
}
inline void narrow(float value, Bfloat16& to) {
  to = float_to_bfloat16(value);
}

// One block of one result row, all three planes.
template <typename T>
void preprocess_block(const Source& source, const BilinearTap& row, const ColumnTaps& taps,
                      int count, const PlaneTransform& transform,
                      T* out,  // [3, plane_stride], at the block
                      std::int64_t plane_stride) {
  const float ty = row.t;
  std::uint32_t words[4][kBlockColumns];
  load_row(source, row.lower, taps.lower, count, words[0]);
  load_row(source, row.lower, taps.upper, count, words[1]);
  load_row(source, row.upper, taps.lower, count, words[2]);
  load_row(source, row.upper, taps.upper, count, words[3]);
  for (int plane = 0; plane < 3; ++plane) {
    const int shift = 8 * transform.source[plane];
    const float scale = transform.scale[plane];
    const float offset = transform.shift[plane];
    T* plane_out = out + plane * plane_stride;
    float wide[kBlockColumns];
    float* to = wide;
    if constexpr (std::is_same_v<T, float>) {
      to = plane_out;
    }
    for (int column = 0; column < count; ++column) {
      const float t = taps.t[column];
      const float above =
          lerp(channel_of(words[0][column], shift), channel_of(words[1][column], shift), t);
      const float below =
          lerp(channel_of(words[2][column], shift), channel_of(words[3][column], shift), t);
      to[column] = lerp(above, below, ty) * scale + offset;
    }
    if constexpr (!std::is_same_v<T, float>) {
      for (int column = 0; column < count; ++column) {
        narrow(wide[column], plane_out[column]);
      }
    }
  }
}

ColumnTaps column_taps(std::int64_t first, int count, std::int64_t source, std::int64_t target,
                       std::uint32_t pixel_bytes, Align align) {
  ColumnTaps taps;
  for (int column = 0; column < count; ++column) {
    const BilinearTap tap =
        bilinear_tap(static_cast<std::uint32_t>(first + column), static_cast<std::uint32_t>(source),
                     static_cast<std::uint32_t>(target), align);
    taps.lower[column] = pixel_bytes * tap.lower;
    taps.upper[column] = pixel_bytes * tap.upper;
    taps.t[column] = tap.t;
  }
  return taps;
}

template <typename T>
void preprocess_rows(const Source& source, const TensorView& frame, std::uint32_t pixel_bytes,
                     T* out, const PreprocessParams& params) {
  const std::int64_t height = frame.shape[0];
  const std::int64_t width = frame.shape[1];
  const PlaneTransform transform = plane_transform(params);
  const std::int64_t plane_stride = params.height * params.width;
  parallel_for(
      0, params.height, kGrainPixels / params.width + 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t first = 0; first < params.width; first += kBlockColumns) {
          const std::int64_t left = params.width - first;
          const int count = left < kBlockColumns ? static_cast<int>(left) : kBlockColumns;
          const ColumnTaps taps = column_taps(params.left + first, count, width,
                                              params.resized_width(), pixel_bytes, params.align);
          for (std::int64_t y = begin; y < end; ++y) {
            const BilinearTap row = bilinear_tap(
                static_cast<std::uint32_t>(params.top + y), static_cast<std::uint32_t>(height),
                static_cast<std::uint32_t>(params.resized_height()), params.align);
            preprocess_block(source, row, taps, count, transform, out + y * params.width + first,
                             plane_stride);
          }
        }
      });
}

}  // namespace

void preprocess_cpu(const CameraFrame& frame, const TensorView& out,
                    const PreprocessParams& params) {
  const std::int64_t height = frame.pixels.shape[0];
  const std::int64_t width = frame.pixels.shape[1];
  const std::uint32_t pixel_bytes = frame.chroma == nullptr ? 3 : 1;
  const auto* pixels = frame.pixels.as<const std::uint8_t>();
  Source source = {
      pixels, nullptr, 3 * width, 0, pixels + 3 * (height * width - 1), yuv_to_rgb(params.matrix)};
  if (frame.chroma != nullptr) {
    source.chroma = frame.chroma->as<const std::uint8_t>();
    source.row_bytes = frame.luma_row();
    source.chroma_row_bytes = frame.chroma_row();
    source.last_pixel = nullptr;
  }
  ZSSEG_DISPATCH_ANY_FLOAT(out.dtype, T,
                           preprocess_rows(source, frame.pixels, pixel_bytes, out.as<T>(), params));
}

}  // namespace ZSSEG_ISA_NAMESPACE
}  // namespace zsseg
