#include <cstdint>

#include "zsseg/cuda_launch.h"
#include "zsseg/cuda_raii.h"
#include "zsseg/ops/ink.h"

namespace zsseg {
namespace {

constexpr int kBlockX = 32, kBlockY = 8;

struct InkProblem {
  std::uint8_t* picture;                  // of the window's first pixel
  const std::uint8_t* weights;            // the same, of the first colour
  std::int64_t picture_row, weights_row;  // bytes from one row to the next
  std::int64_t plane;                     // from one colour's weights to the next
  std::uint32_t height, width;            // of the window
  int count;
  InkParams params;
};

// A thread takes a pixel, and leaves it alone where no colour has a weight there, as in most of a
// name's window. Bytes: a weight of each colour read, and for pixels with ink 3 read, 3 written; a
// name of two colours in 60 x 400 pixels: 0.1 MB. Operations: about 15 a pixel of the window, 30
// more a colour for pixels with ink. Floors: below 0.1 us on an H200, 0.6 us by bytes and 0.5 us by
// operations on an Orin AGX: the launch takes longer. Caller guarantees: a window that is not empty
// and lies in both arrays.
__global__ void __launch_bounds__(kBlockX* kBlockY) ink_kernel(InkProblem problem) {
  const std::uint32_t x = blockIdx.x * kBlockX + threadIdx.x;
  const std::uint32_t row = blockIdx.y * kBlockY + threadIdx.y;
  if (x >= problem.width || row >= problem.height) {
    return;
  }
  const std::uint8_t* from = problem.weights + row * problem.weights_row + x;
  std::uint8_t* pixel = problem.picture + row * problem.picture_row + 3 * x;
  ZSSEG_UNROLL(kMostInks)  // or the colours would be copied to where they can be counted through
  for (int layer = 0; layer < kMostInks; ++layer) {
    const std::uint32_t weight = layer < problem.count ? from[layer * problem.plane] : 0;
    if (weight != 0) {
      for (int channel = 0; channel < 3; ++channel) {
        pixel[channel] = ink_blend(pixel[channel], problem.params.colours[layer][channel], weight);
      }
    }
  }
}

}  // namespace

void ink_cuda(const TensorView& picture, const TensorView& weights, const InkParams& params,
              const InkWindow& window, StreamHandle stream) {
  const DeviceGuard guard(picture.device.index);
  InkProblem problem = {};
  problem.picture_row = 3 * picture.shape[1];
  problem.picture = picture.as<std::uint8_t>() + (params.top + window.row) * problem.picture_row +
                    3 * (params.left + window.column);
  problem.weights =
      weights.as<const std::uint8_t>() + window.row * weights.shape[2] + window.column;
  problem.plane = weights.shape[1] * weights.shape[2];
  problem.weights_row = weights.shape[2];
  problem.height = static_cast<std::uint32_t>(window.height);
  problem.width = static_cast<std::uint32_t>(window.width);
  problem.count = static_cast<int>(weights.shape[0]);
  problem.params = params;
  const dim3 grid((problem.width + kBlockX - 1) / kBlockX,
                  (problem.height + kBlockY - 1) / kBlockY);
  launch("ink_kernel", ink_kernel, {grid, dim3(kBlockX, kBlockY)}, to_stream(stream), problem);
}

}  // namespace zsseg
