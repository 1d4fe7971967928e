#include "zsseg/ops/ink.h"

#include <algorithm>
#include <string>

#include "zsseg/check.h"
#include "zsseg/cpu_dispatch.h"
#include "zsseg/error.h"
#include "zsseg/ops/camera_frame.h"

namespace zsseg {

void ink(const TensorView& picture, const TensorView& weights, const InkParams& params) {
  expect_dtype("picture", picture, {DType::uint8});
  expect_shape("picture", picture, {kAnySize, kAnySize, 3});
  expect_sides("picture", picture);
  expect_dtype("weights", weights, {DType::uint8});
  expect_shape("weights", weights, {kAnySize, kAnySize, kAnySize});
  expect_same_device("weights", weights, "picture", picture);
  if (picture.device.is_cuda()) {
    throw DeviceError("picture: expected an array on the CPU, got " + to_string(picture.device) +
                      ". Fetch it with numpy().");
  }
  if (weights.shape[0] < 1 || weights.shape[0] > kMostInks) {
    fail_argument("weights", "those of 1 to 4 colours", std::to_string(weights.shape[0]));
  }
  // Beyond this, nothing of either meets the other, and sums cannot overflow.
  constexpr std::int64_t kFar = std::int64_t{1} << 40;
  const std::int64_t top = std::clamp(params.top, -kFar, kFar);
  const std::int64_t left = std::clamp(params.left, -kFar, kFar);
  InkWindow window = {};
  window.row = std::max<std::int64_t>(0, -top);
  window.column = std::max<std::int64_t>(0, -left);
  window.height = std::min(weights.shape[1], picture.shape[0] - top) - window.row;
  window.width = std::min(weights.shape[2], picture.shape[1] - left) - window.column;
  if (window.height > 0 && window.width > 0) {
    ZSSEG_CALL_CPU_KERNEL(ink_cpu, picture, weights, params, window);
  }
}

}  // namespace zsseg
