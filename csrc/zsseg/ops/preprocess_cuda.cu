#include <cstdint>

#include "zsseg/cuda_launch.h"
#include "zsseg/cuda_raii.h"
#include "zsseg/ops/preprocess.h"
#include "zsseg/ops/preprocess_pixel.h"

namespace zsseg {
namespace {

constexpr int kBlockX = 32;
constexpr int kBlockY = 8;

// One thread a result pixel, all three planes; rows of threads write rows of each plane. Bound by
// memory: 12 bytes written a pixel, the frame read through the cache.
// Caller guarantees: sides of at most kMaxSide (so grid.y fits), no empty dimension.
__global__ void preprocess_kernel(const std::uint8_t* __restrict__ frame,  // [height, width, 3]
                                  float* __restrict__ out,  // [3, out_height, out_width]
                                  std::uint32_t height, std::uint32_t width,
                                  std::uint32_t out_height, std::uint32_t out_width,
                                  PlaneTransform transform) {
  const std::uint32_t x = blockIdx.x * kBlockX + threadIdx.x;
  const std::uint32_t y = blockIdx.y * kBlockY + threadIdx.y;
  if (x >= out_width || y >= out_height) {
    return;
  }
  const BilinearTap column = bilinear_tap(x, width, out_width);
  const BilinearTap row = bilinear_tap(y, height, out_height);
  const std::int64_t row_bytes = 3 * std::int64_t{width};
  const std::uint8_t* above = frame + row.lower * row_bytes;
  const std::uint8_t* below = frame + row.upper * row_bytes;
  const std::int64_t plane_stride = std::int64_t{out_height} * out_width;
  float* pixel = out + std::int64_t{y} * out_width + x;
  for (int plane = 0; plane < 3; ++plane) {
    const int channel = transform.source[plane];
    const std::uint32_t left = 3u * column.lower + channel;
    const std::uint32_t right = 3u * column.upper + channel;
    const float value = lerp(lerp(above[left], above[right], column.t),
                             lerp(below[left], below[right], column.t), row.t);
    pixel[plane * plane_stride] = value * transform.scale[plane] + transform.shift[plane];
  }
}

}  // namespace

void preprocess_cuda(const TensorView& frame, const TensorView& out, const PreprocessParams& params,
                     StreamHandle stream) {
  const DeviceGuard guard(out.device.index);
  const auto out_height = static_cast<std::uint32_t>(params.height);
  const auto out_width = static_cast<std::uint32_t>(params.width);
  const dim3 block(kBlockX, kBlockY);
  const dim3 grid((out_width + kBlockX - 1) / kBlockX, (out_height + kBlockY - 1) / kBlockY);
  launch("preprocess_kernel", preprocess_kernel, {grid, block}, to_stream(stream),
         frame.as<const std::uint8_t>(), out.as<float>(),
         static_cast<std::uint32_t>(frame.shape[0]), static_cast<std::uint32_t>(frame.shape[1]),
         out_height, out_width, plane_transform(params));
}

}  // namespace zsseg
