#include <cstdint>

#include "zsseg/cuda_launch.h"
#include "zsseg/cuda_raii.h"
#include "zsseg/dtype_dispatch.h"
#include "zsseg/ops/overlay.h"
#include "zsseg/ops/overlay_pixel.h"
#include "zsseg/wide_cuda.h"

namespace zsseg {
namespace {

constexpr int kThreads = 256;
constexpr int kPixels = 4;  // of a thread: 12 bytes, three words

// The bytes of kPixels pixels.
struct Group {
  std::uint32_t word[3];

  ZSSEG_HOST_DEVICE std::uint32_t byte(int index) const {
    return word[index / 4] >> (8 * (index % 4)) & 0xffu;
  }
};

template <typename Label>
__device__ std::uint32_t blended(std::uint32_t own, Label label, int channel,
                                 const std::uint8_t* __restrict__ palette, std::int64_t num_colours,
                                 std::uint32_t weight) {
  const bool coloured = overlay_has_colour(label, num_colours);
  const std::uint32_t colour = coloured ? palette[3 * std::int64_t{label} + channel] : own;
  return overlay_blend(own, colour, weight);
}

// A thread takes kPixels pixels: where all arrays are aligned, in three loads of the frame, one of
// the labels and three stores, all coalesced; the palette stays in cache.
// Bytes: 3 + sizeof(Label) read, 3 written a pixel; 1080p with uint8 labels: 14.5 MB. Operations:
// about 40 a pixel. Floors: 3.0 us by bytes, 2.5 us by operations on an H200; 71 and 31 us on an
// Orin AGX. Caller guarantees: contiguous arrays, at least one pixel.
template <typename Label>
__global__ void __launch_bounds__(kThreads)
    overlay_kernel(const std::uint8_t* frame,                 // [count, 3]
                   const Label* __restrict__ labels,          // [count]
                   const std::uint8_t* __restrict__ palette,  // [num_colours, 3]
                   std::uint8_t* out,                         // [count, 3], may be frame
                   std::int64_t count, std::int64_t num_colours, std::uint32_t weight,
                   bool aligned) {
  const std::int64_t group = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const std::int64_t first = kPixels * group;
  if (aligned && first + kPixels <= count) {
    const std::uint32_t* from = reinterpret_cast<const std::uint32_t*>(frame) + 3 * group;
    const Group own = {{from[0], from[1], from[2]}};
    const auto four = reinterpret_cast<const Wide<Label, kPixels>*>(labels)[group];
    std::uint32_t mixed[3] = {0, 0, 0};
    for (int i = 0; i < 3 * kPixels; ++i) {
      mixed[i / 4] |= blended(own.byte(i), four.value[i / 3], i % 3, palette, num_colours, weight)
                      << (8 * (i % 4));
    }
    std::uint32_t* to = reinterpret_cast<std::uint32_t*>(out) + 3 * group;
    to[0] = mixed[0];
    to[1] = mixed[1];
    to[2] = mixed[2];
    return;
  }
  for (std::int64_t pixel = first; pixel < first + kPixels && pixel < count; ++pixel) {
    for (int channel = 0; channel < 3; ++channel) {
      out[3 * pixel + channel] = static_cast<std::uint8_t>(blended(
          frame[3 * pixel + channel], labels[pixel], channel, palette, num_colours, weight));
    }
  }
}

}  // namespace

void overlay_cuda(const TensorView& frame, const TensorView& labels, const TensorView& palette,
                  const TensorView& out, const OverlayParams& params, StreamHandle stream) {
  const DeviceGuard guard(out.device.index);
  const std::int64_t count = labels.count();
  const std::int64_t groups = (count + kPixels - 1) / kPixels;
  const auto blocks = static_cast<unsigned>((groups + kThreads - 1) / kThreads);
  const bool aligned = is_aligned(frame.data, 4) && is_aligned(out.data, 4) &&
                       is_aligned(labels.data, kPixels * size_of(labels.dtype));
  ZSSEG_DISPATCH_LABEL(
      labels.dtype, Label,
      launch("overlay_kernel", overlay_kernel<Label>, {blocks, kThreads}, to_stream(stream),
             frame.as<const std::uint8_t>(), labels.as<const Label>(),
             palette.as<const std::uint8_t>(), out.as<std::uint8_t>(), count, palette.shape[0],
             overlay_weight(params.alpha), aligned));
}

}  // namespace zsseg
