#include <cstdint>

#include "zsseg/cuda_launch.h"
#include "zsseg/cuda_raii.h"
#include "zsseg/dtype_dispatch.h"
#include "zsseg/ops/overlay.h"
#include "zsseg/ops/overlay_pixel.h"

namespace zsseg {
namespace {

constexpr int kBlockPixels = 256;

// One thread a pixel. Bound by memory: 3 + sizeof(Label) bytes read, 3 written a pixel; the palette
// stays in cache. Caller guarantees: contiguous arrays, at least one pixel.
template <typename Label>
__global__ void overlay_kernel(const std::uint8_t* frame,                 // [count, 3]
                               const Label* __restrict__ labels,          // [count]
                               const std::uint8_t* __restrict__ palette,  // [num_colours, 3]
                               std::uint8_t* out,  // [count, 3], may be frame
                               std::int64_t count, std::int64_t num_colours, std::uint32_t weight) {
  const std::int64_t pixel = static_cast<std::int64_t>(blockIdx.x) * kBlockPixels + threadIdx.x;
  if (pixel >= count) {
    return;
  }
  const Label label = labels[pixel];
  const bool coloured = overlay_has_colour(label, num_colours);
  for (int channel = 0; channel < 3; ++channel) {
    const std::uint8_t own = frame[3 * pixel + channel];
    const std::uint8_t colour = coloured ? palette[3 * std::int64_t{label} + channel] : own;
    out[3 * pixel + channel] = overlay_blend(own, colour, weight);
  }
}

}  // namespace

void overlay_cuda(const TensorView& frame, const TensorView& labels, const TensorView& palette,
                  const TensorView& out, const OverlayParams& params, StreamHandle stream) {
  const DeviceGuard guard(out.device.index);
  const std::int64_t count = labels.count();
  const auto blocks = static_cast<unsigned>((count + kBlockPixels - 1) / kBlockPixels);
  ZSSEG_DISPATCH_LABEL(
      labels.dtype, Label,
      launch("overlay_kernel", overlay_kernel<Label>, {blocks, kBlockPixels}, to_stream(stream),
             frame.as<const std::uint8_t>(), labels.as<const Label>(),
             palette.as<const std::uint8_t>(), out.as<std::uint8_t>(), count, palette.shape[0],
             overlay_weight(params.alpha)));
}

}  // namespace zsseg
