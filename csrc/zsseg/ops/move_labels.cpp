#include "zsseg/ops/move_labels.h"

#include <string>

#include "zsseg/check.h"
#include "zsseg/cpu_dispatch.h"
#include "zsseg/error.h"

namespace zsseg {

void move_labels(const MoveLabels& arrays, const MoveLimits& limits) {
  constexpr std::int64_t kShortest = 3;  // means are taken over two pixels to each side
  const TensorView& labels = arrays.labels;
  expect_dtype("labels", labels, {DType::uint8, DType::uint16});
  expect_shape("labels", labels, {kAnySize, kAnySize});
  expect_dtype("out", arrays.out, {labels.dtype});
  expect_shape("out", arrays.out, labels.shape);
  expect_dtype("start", arrays.start, {DType::uint8});
  expect_shape("start", arrays.start, {kAnySize, kAnySize, 3});
  const std::int64_t height = arrays.start.shape[0], width = arrays.start.shape[1];
  if (height < kShortest || width < kShortest) {
    fail_argument("start", "at least 3 pixels to each side", to_string(arrays.start.shape));
  }
  expect_dtype("now", arrays.now, {DType::uint8});
  expect_shape("now", arrays.now, arrays.start.shape);
  const auto expect_flow = [&](const char* name, const TensorView& flow) {
    expect_dtype(name, flow, {DType::float32});
    expect_shape(name, flow, {height, width, 2});
  };
  expect_flow("flow", arrays.flow);
  expect_flow("out_flow", arrays.out_flow);
  if (arrays.refined.data != nullptr) {
    expect_flow("refined", arrays.refined);
  }
  for (const TensorView* view :
       {&arrays.start, &arrays.now, &arrays.flow, &arrays.refined, &arrays.out, &arrays.out_flow}) {
    expect_same_device("labels", labels, "the others", *view);
  }
  if (labels.device.is_cuda()) {
    throw DeviceError("labels: expected an array on the CPU, got " + to_string(labels.device) +
                      ". Fetch it with numpy().");
  }
  if (labels.shape[0] > 0 && labels.shape[1] > 0) {
    ZSSEG_CALL_CPU_KERNEL(move_labels_cpu, arrays, limits);
  }
}

}  // namespace zsseg
