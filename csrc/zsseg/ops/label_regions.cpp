#include "zsseg/ops/label_regions.h"

#include <cmath>
#include <string>

#include "zsseg/check.h"
#include "zsseg/error.h"
#include "zsseg/kernel_dispatch.h"
#include "zsseg/ops/upsample_argmax_math.h"
#include "zsseg/thread_pool.h"

namespace zsseg {
namespace {

using upsample::kLongestSide;

constexpr std::int64_t kMaxClasses = 65534;  // 65535 is unknown
constexpr std::int64_t kMaxBytesClasses = 254;
constexpr std::int64_t kRowAlign = 32;  // two vectors of the widest instruction set

void expect_sides(const char* name, std::int64_t height, std::int64_t width, const Shape& shown,
                  const char* remedy) {
  if (height < 1 || width < 1 || height > kLongestSide || width > kLongestSide) {
    throw ShapeError(std::string(name) + ": expected sides from 1 to 32767, got " +
                     to_string(shown) + ". " + remedy);
  }
}

void expect_counts(const LabelRegionsInputs& inputs) {
  const Shape& scores = inputs.class_scores.shape;
  if (scores[1] < 1 || scores[1] > kMaxRegions) {
    throw ShapeError("class_scores: expected from 1 to " + std::to_string(kMaxRegions) +
                     " regions, got " + to_string(scores) + ". Drop regions.");
  }
  if (scores[0] < 1 || scores[0] > kMaxClasses) {
    throw ShapeError("class_scores: expected from 1 to 65534 classes, got " + to_string(scores) +
                     ". Set the classes first.");
  }
}

void expect_result(const char* name, const TensorView& view, DType dtype, const Shape& shape,
                   const LabelRegionsInputs& inputs) {
  expect_dtype(name, view, {dtype});
  expect_shape(name, view, shape);
  expect_same_device(name, view, "mask_logits", inputs.mask_logits);
}

std::int64_t round_up(std::int64_t count) {
  return (count + kRowAlign - 1) / kRowAlign * kRowAlign;
}

}  // namespace

Shape label_regions_shape(const LabelRegionsInputs& inputs, const LabelRegionsParams& params) {
  const TensorView& masks = inputs.mask_logits;
  expect_dtype("mask_logits", masks, {DType::float32});
  expect_shape("mask_logits", masks, {kAnySize, kAnySize, kAnySize});
  expect_sides("mask_logits", masks.shape[1], masks.shape[2], masks.shape,
               "Check the order of its axes.");
  expect_dtype("class_scores", inputs.class_scores, {DType::float32});
  expect_shape("class_scores", inputs.class_scores, {kAnySize, masks.shape[0]});
  expect_same_device("class_scores", inputs.class_scores, "mask_logits", masks);
  expect_counts(inputs);
  if (inputs.bias != nullptr) {
    expect_dtype("bias", *inputs.bias, {DType::float32});
    expect_shape("bias", *inputs.bias, {inputs.class_scores.shape[0]});
    expect_same_device("bias", *inputs.bias, "mask_logits", masks);
  }
  expect_sides("canvas_hw", params.canvas_height, params.canvas_width,
               {params.canvas_height, params.canvas_width}, "Pass (height, width).");
  expect_sides("out_hw", params.height, params.width, {params.height, params.width},
               "Pass (height, width).");
  if (std::isnan(params.unknown_below)) {
    fail_argument("unknown_below", "a number or None", "nan");
  }
  return {params.height, params.width};
}

DType label_regions_dtype(const LabelRegionsInputs& inputs) {
  return inputs.class_scores.shape[0] <= kMaxBytesClasses ? DType::uint8 : DType::uint16;
}

LabelRegionsLayout label_regions_layout(const LabelRegionsInputs& inputs,
                                        const LabelRegionsParams& params, std::int64_t num_tasks) {
  LabelRegionsLayout layout = {};
  std::int64_t end = 0;
  const auto take = [&end](std::int64_t count) {
    const std::int64_t offset = end;
    end += round_up(count);
    return offset;
  };
  const std::int64_t num_classes = inputs.class_scores.shape[0];
  layout.num_tasks = num_tasks;
  layout.row = round_up(params.canvas_width + 1);  // one more: the last pixel's right neighbour
  layout.out_row = round_up(params.width);
  layout.cell = take(layout.row);
  layout.t = take(layout.row);
  layout.out_cell = take(layout.out_row);
  layout.out_t = take(layout.out_row);
  layout.tasks = end;
  end = 0;
  layout.soft = take(inputs.class_scores.shape[1] * layout.row);
  layout.maps = take(2 * num_classes * layout.row);
  layout.blend = take(layout.row + inputs.mask_logits.shape[2]);
  layout.best = take(layout.out_row);
  layout.score = take(layout.out_row);
  layout.index = take(layout.out_row);
  layout.task_floats = end;
  return layout;
}

std::size_t bytes_of(const LabelRegionsLayout& layout) {
  const std::int64_t floats = layout.tasks + layout.num_tasks * layout.task_floats;
  return static_cast<std::size_t>(floats) * sizeof(float);
}

std::size_t label_regions_device_bytes(std::int64_t num_classes, std::int64_t num_regions) {
  constexpr std::int64_t kStepClasses = 64, kDepth = 16;  // of the kernel's matrix products
  const std::int64_t classes = (num_classes + kStepClasses - 1) / kStepClasses * kStepClasses;
  const std::int64_t regions = (num_regions + kDepth - 1) / kDepth * kDepth;
  return static_cast<std::size_t>(classes * regions * 4 + classes * 16);
}

std::size_t label_regions_workspace_bytes(const LabelRegionsInputs& inputs,
                                          const LabelRegionsParams& params) {
  if (inputs.mask_logits.device.is_cuda()) {
    return label_regions_device_bytes(inputs.class_scores.shape[0], inputs.class_scores.shape[1]);
  }
  return bytes_of(label_regions_layout(inputs, params, num_threads()));
}

namespace {

// One task's share is enough; with less memory than for every thread, fewer tasks run.
void expect_workspace(const TensorView& workspace, const LabelRegionsInputs& inputs,
                      const LabelRegionsParams& params) {
  expect_same_device("workspace", workspace, "mask_logits", inputs.mask_logits);
  const std::size_t needed = inputs.mask_logits.device.is_cuda()
                                 ? label_regions_workspace_bytes(inputs, params)
                                 : bytes_of(label_regions_layout(inputs, params, 1));
  if (workspace.bytes() < needed) {
    throw ShapeError("workspace: expected at least " + std::to_string(needed) + " bytes, got " +
                     std::to_string(workspace.bytes()) +
                     ". Ask label_regions_workspace_bytes for the size.");
  }
}

}  // namespace

void label_regions(const LabelRegionsInputs& inputs, const TensorView& labels,
                   const TensorView* scores, const TensorView& workspace,
                   const LabelRegionsParams& params, StreamHandle stream) {
  const Shape shape = label_regions_shape(inputs, params);
  expect_result("labels", labels, label_regions_dtype(inputs), shape, inputs);
  if (scores != nullptr) {
    expect_result("scores", *scores, DType::float32, shape, inputs);
  }
  expect_workspace(workspace, inputs, params);
  ZSSEG_RUN_KERNEL(labels, label_regions, stream, inputs, labels, scores, workspace, params);
}

}  // namespace zsseg
