#include <cstdint>

#include "zsseg/dtype_dispatch.h"
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

}  // namespace

void overlay_cpu(const TensorView& frame, const TensorView& labels, const TensorView& palette,
                 const TensorView& out, const OverlayParams& params) {
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
          overlay_chunk(frame.as<const std::uint8_t>() + 3 * first,
                        labels.as<const Label>() + first, palette.as<const std::uint8_t>(),
                        num_colours, weight, count, out.as<std::uint8_t>() + 3 * first));
    }
  });
}

}  // namespace ZSSEG_ISA_NAMESPACE
}  // namespace zsseg
