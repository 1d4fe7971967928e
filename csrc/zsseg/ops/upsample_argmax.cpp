#include "zsseg/ops/upsample_argmax.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "zsseg/check.h"
#include "zsseg/error.h"
#include "zsseg/kernel_dispatch.h"
#include "zsseg/ops/class_logits.h"
#include "zsseg/ops/overlay.h"
#include "zsseg/thread_pool.h"

namespace zsseg {
namespace {

constexpr std::int64_t kMaxBytesClasses = 254;
constexpr std::int64_t kMaxSeenOnHost = 8192;  // travel to CUDA as bits in a launch's parameters
constexpr int kAlign = 16;                     // classes; kClassAlign of the CPU kernel
constexpr std::int64_t kScratchFloats = 13;    // a class; kScratchFloats of the CPU kernel
constexpr std::int64_t kTablePadding = 16;     // elements read past the end of the fractions

void check_sizes(const TensorView& logits, const UpsampleArgmaxParams& params) {
  expect_class_logits(logits);
  if (!is_image_side(params.height) || !is_image_side(params.width)) {
    throw ShapeError("out_hw: expected sides from 1 to 32767, got " +
                     to_string(Shape{params.height, params.width}) + ". Pass (height, width).");
  }
}

void check_seen(const TensorView& logits, const TensorView& seen) {
  expect_dtype("seen", seen, {DType::boolean});
  expect_shape("seen", seen, {logits.shape[1]});
  if (seen.device.is_cuda() || !logits.device.is_cuda()) {
    expect_same_device("seen", seen, "logits", logits);
  } else if (seen.shape[0] > kMaxSeenOnHost) {
    throw DeviceError("seen: expected at most 8192 classes in host memory, got " +
                      std::to_string(seen.shape[0]) + ". Put it on the device of logits.");
  }
}

void expect_result(const char* name, const TensorView& view, DType dtype, const Shape& shape,
                   const TensorView& logits) {
  expect_dtype(name, view, {dtype});
  expect_shape(name, view, shape);
  expect_same_device(name, view, "logits", logits);
}

void check_label_table(const TensorView& logits, const TensorView& table) {
  expect_dtype("label_table", table, {DType::uint8, DType::uint16});
  expect_shape("label_table", table, {kAnySize});
  if (table.shape[0] < logits.shape[1]) {
    throw ShapeError("label_table: expected at least " + std::to_string(logits.shape[1]) +
                     " labels, one a class, got " + std::to_string(table.shape[0]) +
                     ". Make it longer.");
  }
  expect_same_device("label_table", table, "logits", logits);
}

void check_num_classes(const TensorView& logits, const TensorView& num_classes) {
  expect_dtype("num_classes", num_classes, {DType::int32});
  expect_shape("num_classes", num_classes, {1});
  expect_same_device("num_classes", num_classes, "logits", logits);
  if (!logits.device.is_cuda()) {
    const std::int32_t count = *num_classes.as<const std::int32_t>();
    if (count < 0 || count > logits.shape[1]) {
      fail_argument("num_classes", "from 0 to " + std::to_string(logits.shape[1]),
                    std::to_string(count));
    }
  }
}

// The frame tells the size of the result.
void check_overlay(const TensorView& logits, const TensorView& labels, const LabelOverlay& drawn) {
  if (logits.shape[0] != 1) {
    throw ShapeError("logits: expected one image to draw an overlay of, got " +
                     std::to_string(logits.shape[0]) + ". Draw them one by one.");
  }
  TensorView one = labels;
  one.shape = {labels.shape[1], labels.shape[2]};
  const Shape shape = overlay_shape({drawn.frame}, one, drawn.palette, {drawn.alpha});
  expect_result("picture", drawn.picture, DType::uint8, shape, logits);
}

int round_up(std::int64_t count) {
  return static_cast<int>((count + kAlign - 1) / kAlign * kAlign);
}

// How many of the first `num_classes` classes are in the group that the bias lowers; 0 where one
// group does for all.
std::int64_t count_seen(const TensorView* seen, std::int64_t num_classes, float bias) {
  if (seen == nullptr || bias == 0.0f) {
    return 0;
  }
  const bool* flags = seen->as<const bool>();
  const std::int64_t num_seen = std::count(flags, flags + num_classes, true);
  return num_seen == num_classes ? 0 : num_seen;
}

}  // namespace

Shape upsample_argmax_shape(const UpsampleArgmaxInputs& inputs,
                            const UpsampleArgmaxParams& params) {
  const TensorView& logits = inputs.logits;
  expect_dtype("logits", logits, {DType::float32, DType::float16, DType::bfloat16});
  expect_shape("logits", logits, {kAnySize, kAnySize, kAnySize, kAnySize});
  check_sizes(logits, params);
  if (inputs.seen != nullptr) {
    check_seen(logits, *inputs.seen);
  }
  if (inputs.label_table != nullptr) {
    check_label_table(logits, *inputs.label_table);
  }
  if (inputs.num_classes != nullptr) {
    check_num_classes(logits, *inputs.num_classes);
  }
  if (inputs.overlay != nullptr) {
    expect_dtype("frame", inputs.overlay->frame, {DType::uint8});
    expect_shape("frame", inputs.overlay->frame, {params.height, params.width, 3});
  }
  if (!std::isfinite(params.seen_bias)) {
    fail_argument("seen_bias", "a finite number", to_text(params.seen_bias));
  }
  if (std::isnan(params.unknown_below)) {
    fail_argument("unknown_below", "a number or None", "nan");
  }
  return {logits.shape[0], params.height, params.width};
}

DType upsample_argmax_label_dtype(const UpsampleArgmaxInputs& inputs) {
  if (inputs.label_table != nullptr) {
    return inputs.label_table->dtype;
  }
  return inputs.logits.shape[1] <= kMaxBytesClasses ? DType::uint8 : DType::uint16;
}

CpuLayout upsample_argmax_cpu_layout(const UpsampleArgmaxInputs& inputs,
                                     const UpsampleArgmaxParams& params, int num_slots) {
  const TensorView& logits = inputs.logits;
  const std::int64_t num_classes =
      inputs.num_classes == nullptr ? logits.shape[1] : *inputs.num_classes->as<std::int32_t>();
  const std::int64_t num_seen = count_seen(inputs.seen, num_classes, params.seen_bias);
  const std::int64_t held_points = 2 * logits.shape[3];
  CpuLayout layout = {};
  layout.num_classes = static_cast<int>(num_classes);
  layout.num_groups = num_seen > 0 ? 2 : 1;
  layout.group_begin[1] = round_up(std::max<std::int64_t>(num_classes - num_seen, 1));
  layout.group_begin[2] = layout.group_begin[1] + round_up(num_seen);
  const std::int64_t positions = layout.group_begin[layout.num_groups];
  layout.num_slots = num_slots;
  std::size_t end = 0;
  const auto take = [&end](std::int64_t count) {  // of 4-byte elements
    const std::size_t offset = end;
    end += static_cast<std::size_t>((count + 15) / 16 * 64);
    return offset;
  };
  layout.ids = take(positions);
  layout.row_s = take(params.height + kTablePadding);
  layout.row_t = take(params.height + kTablePadding);
  layout.column_s = take(params.width + kTablePadding);
  layout.column_t = take(params.width + kTablePadding);
  layout.row_begin = take(logits.shape[2] + 1);
  layout.column_begin = take(logits.shape[3] + 1);
  layout.slots = end;
  end = 0;
  layout.vectors = take(held_points * positions);
  layout.top_logit = take(layout.num_groups * held_points);
  layout.top = take(layout.num_groups * held_points);
  layout.rows = take(2);
  layout.scratch = take(kScratchFloats * positions);
  layout.slot_bytes = end;
  layout.bytes = layout.slots + static_cast<std::size_t>(num_slots) * layout.slot_bytes;
  return layout;
}

std::size_t upsample_argmax_workspace_bytes(const UpsampleArgmaxInputs& inputs,
                                            const UpsampleArgmaxParams& params) {
  if (inputs.logits.device.is_cuda()) {
    return 0;
  }
  UpsampleArgmaxInputs largest = inputs;
  largest.num_classes = nullptr;
  return upsample_argmax_cpu_layout(largest, params, num_threads()).bytes;
}

void upsample_argmax(const UpsampleArgmaxInputs& inputs, const TensorView& labels,
                     const TensorView* scores, const TensorView& workspace,
                     const UpsampleArgmaxParams& params, StreamHandle stream) {
  const TensorView& logits = inputs.logits;
  const Shape shape = upsample_argmax_shape(inputs, params);
  expect_result("labels", labels, upsample_argmax_label_dtype(inputs), shape, logits);
  if (scores != nullptr) {
    expect_result("scores", *scores, DType::float32, shape, logits);
  }
  if (inputs.overlay != nullptr) {
    check_overlay(logits, labels, *inputs.overlay);
  }
  if (labels.count() == 0) {
    return;
  }
  expect_same_device("workspace", workspace, "logits", logits);
  const std::size_t needed =
      logits.device.is_cuda() ? 0 : upsample_argmax_cpu_layout(inputs, params, 1).bytes;
  if (workspace.bytes() < needed) {
    throw ShapeError("workspace: expected at least " + std::to_string(needed) + " bytes, got " +
                     std::to_string(workspace.bytes()) +
                     ". Ask upsample_argmax_workspace_bytes for the size.");
  }
  ZSSEG_RUN_KERNEL(labels, upsample_argmax, stream, inputs, labels, scores, workspace, params);
  if (inputs.overlay != nullptr && !labels.device.is_cuda()) {
    const LabelOverlay& drawn = *inputs.overlay;
    TensorView one = labels;
    one.shape = {labels.shape[1], labels.shape[2]};
    overlay({drawn.frame}, one, drawn.palette, drawn.picture, {drawn.alpha}, stream);
  }
}

}  // namespace zsseg
