#include <algorithm>
#include <cstdint>

#include "zsseg/cuda_launch.h"
#include "zsseg/cuda_raii.h"
#include "zsseg/dtype_dispatch.h"
#include "zsseg/ops/all_finite.h"

namespace zsseg {
namespace {

constexpr int kBlockValues = 256;
constexpr std::int64_t kMostBlocks = 1024;  // enough to fill any GPU

__global__ void begin_finite_kernel(std::uint8_t* out) {  // [1]
  *out = 1;
}

// A thread takes every stride-th value, neighbours beside each other. Bound by memory: every value
// is read once. Threads that find one that is not finite write the same zero. 171 x 32 x 32
// float32: 0.7 MB, about 3 operations a value. Floors: 0.15 us by bytes, 0.02 us by operations on
// an H200 (4.8 TB/s, 33 T/s); 3.4 and 0.2 us on an Orin AGX (205 GB/s, 2.7 T/s).
template <typename T>
__global__ void all_finite_kernel(const T* __restrict__ values,  // [count]
                                  std::int64_t count,
                                  std::uint8_t* out) {  // [1], holds 1
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kBlockValues;
  bool finite = true;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kBlockValues + threadIdx.x;
       i < count; i += stride) {
    finite = finite && is_finite(values[i]);
  }
  if (!finite) {
    *out = 0;
  }
}

}  // namespace

void all_finite_cuda(const TensorView& values, const TensorView& out, StreamHandle stream) {
  const DeviceGuard guard(out.device.index);
  const std::int64_t count = values.count();
  const auto blocks = static_cast<unsigned>(
      std::clamp<std::int64_t>((count + kBlockValues - 1) / kBlockValues, 1, kMostBlocks));
  launch("begin_finite_kernel", begin_finite_kernel, {1, 1}, to_stream(stream),
         out.as<std::uint8_t>());
  ZSSEG_DISPATCH_ANY_FLOAT(
      values.dtype, T,
      launch("all_finite_kernel", all_finite_kernel<T>, {blocks, kBlockValues}, to_stream(stream),
             values.as<const T>(), count, out.as<std::uint8_t>()));
}

}  // namespace zsseg
