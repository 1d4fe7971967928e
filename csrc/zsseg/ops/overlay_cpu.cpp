#include <cstdint>

#include "zsseg/dtype_dispatch.h"
#include "zsseg/ops/nv12_pixel.h"
#include "zsseg/ops/overlay.h"
#include "zsseg/ops/overlay_pixel.h"
#include "zsseg/thread_pool.h"

namespace zsseg {
namespace ZSSEG_ISA_NAMESPACE {
namespace {

constexpr int kChunkPixels = 256;
constexpr std::int64_t kGrainPixels = 1 << 17;  // about 50 us of work

// Looks colours up pixel by pixel into a small buffer, then blends bytes in vectors. A pixel
// without a colour gets its own bytes: blending a value with itself gives that value.
template <typename Label>
void overlay_chunk(const std::uint8_t* frame,    // [count, 3]
                   const Label* labels,          // [count]
                   const std::uint8_t* palette,  // [num_colours, 3]
                   std::int64_t num_colours, std::uint32_t weight, int count,
                   std::uint8_t* out) {  // [count, 3], may be `frame`
  std::uint8_t colours[3 * kChunkPixels];
  for (int pixel = 0; pixel < count; ++pixel) {
    const Label label = labels[pixel];
    const std::uint8_t* colour = overlay_has_colour(label, num_colours)
                                     ? palette + 3 * std::int64_t{label}
                                     : frame + 3 * pixel;
    colours[3 * pixel] = colour[0];
    colours[3 * pixel + 1] = colour[1];
    colours[3 * pixel + 2] = colour[2];
  }
  for (int byte = 0; byte < 3 * count; ++byte) {
    out[byte] = overlay_blend(frame[byte], colours[byte], weight);
  }
}

// The RGB, or BGR, of pixels of a row from an even one on.
void convert_pixels(const std::uint8_t* luma, const std::uint8_t* chroma, int count,
                    const YuvToRgb& matrix, bool bgr,
                    std::uint8_t* out) {  // [count, 3]
  for (int pixel = 0; pixel < count; ++pixel) {
    const std::uint8_t* uv = chroma + (pixel & ~1);
    const std::uint32_t word = yuv_word(luma[pixel], uv[0], uv[1], matrix);
    out[3 * pixel] = static_cast<std::uint8_t>(bgr ? word >> 16 : word);
    out[3 * pixel + 1] = static_cast<std::uint8_t>(word >> 8);
    out[3 * pixel + 2] = static_cast<std::uint8_t>(bgr ? word : word >> 16);
  }
}

template <typename Label>
void overlay_nv12_row(const CameraFrame& frame, std::int64_t row, const Label* labels,
                      const TensorView& palette, const OverlayParams& params, std::uint8_t* out) {
  const std::int64_t width = frame.pixels.shape[1];
  const std::uint8_t* luma = frame.pixels.as<const std::uint8_t>() + row * frame.luma_row();
  const std::uint8_t* chroma =
      frame.chroma->as<const std::uint8_t>() + row / 2 * frame.chroma_row();
  const YuvToRgb matrix = yuv_to_rgb(params.matrix);
  std::uint8_t pixels[3 * kChunkPixels];
  for (std::int64_t x = 0; x < width; x += kChunkPixels) {
    const int count = width - x < kChunkPixels ? static_cast<int>(width - x) : kChunkPixels;
    convert_pixels(luma + x, chroma + x, count, matrix, params.bgr, pixels);
    overlay_chunk(pixels, labels + x, palette.as<const std::uint8_t>(), palette.shape[0],
                  overlay_weight(params.alpha), count, out + 3 * x);
  }
}

void overlay_nv12(const CameraFrame& frame, const TensorView& labels, const TensorView& palette,
                  const TensorView& out, const OverlayParams& params) {
  const std::int64_t width = frame.pixels.shape[1];
  parallel_for(0, frame.pixels.shape[0], kGrainPixels / width + 1,
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t row = begin; row < end; ++row) {
                   ZSSEG_DISPATCH_LABEL(
                       labels.dtype, Label,
                       overlay_nv12_row(frame, row, labels.as<const Label>() + row * width, palette,
                                        params, out.as<std::uint8_t>() + 3 * row * width));
                 }
               });
}

}  // namespace

void overlay_cpu(const CameraFrame& frame, const TensorView& labels, const TensorView& palette,
                 const TensorView& out, const OverlayParams& params) {
  if (frame.chroma != nullptr) {
    overlay_nv12(frame, labels, palette, out, params);
    return;
  }
  const std::uint32_t weight = overlay_weight(params.alpha);
  const std::int64_t num_colours = palette.shape[0];
  const std::int64_t chunks_per_grain = kGrainPixels / kChunkPixels;
  const std::int64_t num_chunks = (labels.count() + kChunkPixels - 1) / kChunkPixels;
  parallel_for(0, num_chunks, chunks_per_grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t chunk = begin; chunk < end; ++chunk) {
      const std::int64_t first = chunk * kChunkPixels;
      const std::int64_t left = labels.count() - first;
      const int count = left < kChunkPixels ? static_cast<int>(left) : kChunkPixels;
      ZSSEG_DISPATCH_LABEL(
          labels.dtype, Label,
          overlay_chunk(frame.pixels.as<const std::uint8_t>() + 3 * first,
                        labels.as<const Label>() + first, palette.as<const std::uint8_t>(),
                        num_colours, weight, count, out.as<std::uint8_t>() + 3 * first));
    }
  });
}

}  // namespace ZSSEG_ISA_NAMESPACE
}  // namespace zsseg
