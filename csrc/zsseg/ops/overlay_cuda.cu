#include <cstdint>

#include "zsseg/cuda_launch.h"
#include "zsseg/cuda_raii.h"
#include "zsseg/dtype_dispatch.h"
#include "zsseg/ops/nv12_pixel.h"
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

constexpr int kBlockX = 32, kBlockY = kThreads / kBlockX;

struct Nv12Problem {
  const std::uint8_t* luma;            // [height, width], even sides
  const std::uint8_t* chroma;          // [height / 2, width / 2, 2]
  std::uint32_t luma_row, chroma_row;  // bytes from one row to the next
  const std::uint8_t* palette;         // [num_colours, 3]
  std::uint8_t* out;                   // [height, width, 3]
  std::int64_t num_colours;
  std::uint32_t height, width, weight;
  YuvToRgb matrix;
  bool bgr, aligned;
};

// A pixel's three bytes, the first of the result in the low one.
template <typename Label>
__device__ std::uint32_t nv12_blended(const Nv12Problem& problem, std::uint32_t y, std::uint32_t u,
                                      std::uint32_t v, Label label) {
  const auto signed_u = static_cast<int>(u), signed_v = static_cast<int>(v);
  const std::uint32_t rgb = yuv_word(static_cast<int>(y), signed_u, signed_v, problem.matrix);
  const std::uint32_t low = problem.bgr ? rgb >> 16 : rgb, high = problem.bgr ? rgb : rgb >> 16;
  const std::uint32_t own[3] = {low & 0xffu, rgb >> 8 & 0xffu, high & 0xffu};
  std::uint32_t mixed = 0;
  for (int channel = 0; channel < 3; ++channel) {
    mixed |=
        blended(own[channel], label, channel, problem.palette, problem.num_colours, problem.weight)
        << (8 * channel);
  }
  return mixed;
}

// A thread takes kPixels pixels of a row: where all is aligned, in one load of each plane and of
// the labels, and three stores; two rows share their colours in cache.
// Bytes: 1.5 + sizeof(Label) read, 3 written a pixel; 1080p with uint8 labels: 11.4 MB. Operations:
// about 55 a pixel. Floors: 2.4 us by bytes, 3.4 us by operations on an H200; 56 and 43 us on an
// Orin AGX. Caller guarantees: sides even and of at most kMaxSide, labels and result contiguous.
template <typename Label>
__global__ void __launch_bounds__(kThreads)
    overlay_nv12_kernel(Nv12Problem problem, const Label* __restrict__ labels) {
  const std::uint32_t x = kPixels * (blockIdx.x * kBlockX + threadIdx.x);
  const std::uint32_t row = blockIdx.y * kBlockY + threadIdx.y;
  if (x >= problem.width || row >= problem.height) {
    return;
  }
  const std::uint8_t* luma = problem.luma + std::int64_t{row} * problem.luma_row + x;
  const std::uint8_t* chroma = problem.chroma + std::int64_t{row / 2} * problem.chroma_row + x;
  const std::int64_t at = std::int64_t{row} * problem.width + x;
  std::uint8_t* out = problem.out + 3 * at;
  if (problem.aligned) {
    const std::uint32_t y = *reinterpret_cast<const std::uint32_t*>(luma);
    const std::uint32_t uv = *reinterpret_cast<const std::uint32_t*>(chroma);
    const auto four = *reinterpret_cast<const Wide<Label, kPixels>*>(labels + at);
    std::uint32_t mixed[kPixels];
    for (int i = 0; i < kPixels; ++i) {
      const int pair = 16 * (i / 2);
      mixed[i] = nv12_blended(problem, y >> (8 * i) & 0xffu, uv >> pair & 0xffu,
                              uv >> (pair + 8) & 0xffu, four.value[i]);
    }
    std::uint32_t* to = reinterpret_cast<std::uint32_t*>(out);
    to[0] = mixed[0] | mixed[1] << 24;
    to[1] = mixed[1] >> 8 | mixed[2] << 16;
    to[2] = mixed[2] >> 16 | mixed[3] << 8;
    return;
  }
  for (std::uint32_t i = 0; i < kPixels && x + i < problem.width; ++i) {
    const std::uint8_t* uv = chroma + (i & ~1u);
    const std::uint32_t mixed = nv12_blended(problem, luma[i], uv[0], uv[1], labels[at + i]);
    for (int channel = 0; channel < 3; ++channel) {
      out[3 * i + channel] = static_cast<std::uint8_t>(mixed >> (8 * channel));
    }
  }
}

void overlay_nv12(const CameraFrame& frame, const TensorView& labels, const TensorView& palette,
                  const TensorView& out, const OverlayParams& params, StreamHandle stream) {
  Nv12Problem problem = {};
  problem.luma = frame.pixels.as<const std::uint8_t>();
  problem.chroma = frame.chroma->as<const std::uint8_t>();
  problem.luma_row = static_cast<std::uint32_t>(frame.luma_row());
  problem.chroma_row = static_cast<std::uint32_t>(frame.chroma_row());
  problem.palette = palette.as<const std::uint8_t>();
  problem.out = out.as<std::uint8_t>();
  problem.num_colours = palette.shape[0];
  problem.height = static_cast<std::uint32_t>(frame.pixels.shape[0]);
  problem.width = static_cast<std::uint32_t>(frame.pixels.shape[1]);
  problem.weight = overlay_weight(params.alpha);
  problem.matrix = yuv_to_rgb(params.matrix);
  problem.bgr = params.bgr;
  problem.aligned = problem.width % kPixels == 0 && problem.luma_row % 4 == 0 &&
                    problem.chroma_row % 4 == 0 && is_aligned(problem.luma, 4) &&
                    is_aligned(problem.chroma, 4) && is_aligned(problem.out, 4) &&
                    is_aligned(labels.data, kPixels * size_of(labels.dtype));
  const std::uint32_t columns = kPixels * kBlockX;
  const dim3 grid((problem.width + columns - 1) / columns,
                  (problem.height + kBlockY - 1) / kBlockY);
  ZSSEG_DISPATCH_LABEL(
      labels.dtype, Label,
      launch("overlay_nv12_kernel", overlay_nv12_kernel<Label>, {grid, dim3(kBlockX, kBlockY)},
             to_stream(stream), problem, labels.as<const Label>()));
}

}  // namespace

void overlay_cuda(const CameraFrame& frame, const TensorView& labels, const TensorView& palette,
                  const TensorView& out, const OverlayParams& params, StreamHandle stream) {
  const DeviceGuard guard(out.device.index);
  if (frame.chroma != nullptr) {
    overlay_nv12(frame, labels, palette, out, params, stream);
    return;
  }
  const std::int64_t count = labels.count();
  const std::int64_t groups = (count + kPixels - 1) / kPixels;
  const auto blocks = static_cast<unsigned>((groups + kThreads - 1) / kThreads);
  const bool aligned = is_aligned(frame.pixels.data, 4) && is_aligned(out.data, 4) &&
                       is_aligned(labels.data, kPixels * size_of(labels.dtype));
  ZSSEG_DISPATCH_LABEL(
      labels.dtype, Label,
      launch("overlay_kernel", overlay_kernel<Label>, {blocks, kThreads}, to_stream(stream),
             frame.pixels.as<const std::uint8_t>(), labels.as<const Label>(),
             palette.as<const std::uint8_t>(), out.as<std::uint8_t>(), count, palette.shape[0],
             overlay_weight(params.alpha), aligned));
}

}  // namespace zsseg
