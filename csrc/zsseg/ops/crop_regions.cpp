#include "zsseg/ops/crop_regions.h"

#include <cmath>
#include <string>
#include <vector>

#include "zsseg/check.h"
#include "zsseg/error.h"
#include "zsseg/kernel_dispatch.h"

namespace zsseg {
namespace {

void expect_sides(const char* name, std::int64_t height, std::int64_t width, std::int64_t longest,
                  const Shape& shown, const char* remedy) {
  if (height < 1 || width < 1 || height > longest || width > longest) {
    throw ShapeError(std::string(name) + ": expected sides from 1 to " + std::to_string(longest) +
                     ", got " + to_string(shown) + ". " + remedy);
  }
}

void expect_masks(const TensorView& mask_logits) {
  expect_dtype("mask_logits", mask_logits, {DType::float32});
  expect_shape("mask_logits", mask_logits, {kAnySize, kAnySize, kAnySize});
  expect_sides("mask_logits", mask_logits.shape[1], mask_logits.shape[2], kMaxCanvasSide,
               mask_logits.shape, "Check the order of its axes.");
}

constexpr std::int64_t kBoundsSize = 5;  // of a mask, as mask_boxes writes them

bool is_of_every_mask(const TensorView& boxes) {
  return boxes.shape.rank == 2 && boxes.shape[1] == kBoundsSize;
}

void expect_regions(const TensorView& mask_logits, const TensorView& regions) {
  expect_dtype("regions", regions, {DType::int32});
  expect_shape("regions", regions, {kAnySize});
  if (regions.device.is_cuda()) {
    expect_same_device("regions", regions, "mask_logits", mask_logits);
  }
  if (regions.shape[0] > kMaxCropRegions) {
    throw ShapeError("regions: expected at most " + std::to_string(kMaxCropRegions) + ", got " +
                     std::to_string(regions.shape[0]) + ". Cut them out in several calls.");
  }
  if (regions.device.is_cuda()) {
    if (mask_logits.shape[0] == 0 && regions.shape[0] > 0) {
      fail_argument("regions", "none, as there are no masks", std::to_string(regions.shape[0]));
    }
    return;
  }
  const auto* indices = regions.as<const std::int32_t>();
  for (std::int64_t i = 0; i < regions.shape[0]; ++i) {
    if (indices[i] < 0 || indices[i] >= mask_logits.shape[0]) {
      fail_argument("regions",
                    "indices of the masks, below " + std::to_string(mask_logits.shape[0]),
                    std::to_string(indices[i]));
    }
  }
}

void expect_fitting(const TensorView& image, const std::int32_t* box) {
  const bool fits = box[0] >= 0 && box[0] < box[2] && box[2] <= image.shape[2] && box[1] >= 0 &&
                    box[1] < box[3] && box[3] <= image.shape[1];
  if (!fits) {
    fail_argument("boxes", "x1 < x2 and y1 < y2 within the image",
                  to_string(Shape{box[0], box[1], box[2], box[3]}));
  }
}

// Once regions are known to be right.
void expect_boxes(const TensorView& image, const TensorView& mask_logits, const TensorView& regions,
                  const TensorView& boxes) {
  expect_dtype("boxes", boxes, {DType::int32});
  expect_same_device("boxes", boxes, "regions", regions);
  const bool of_every_mask = is_of_every_mask(boxes) || regions.device.is_cuda();
  expect_shape(
      "boxes", boxes,
      of_every_mask ? Shape{mask_logits.shape[0], kBoundsSize} : Shape{regions.shape[0], 4});
  if (regions.device.is_cuda()) {
    return;
  }
  const auto* box = boxes.as<const std::int32_t>();
  for (std::int64_t i = 0; i < regions.shape[0]; ++i) {
    expect_fitting(image, of_every_mask ? box + kBoundsSize * regions.as<const std::int32_t>()[i]
                                        : box + 4 * i);
  }
}

// The boxes of these regions alone, [R,4], of host arrays.
std::vector<std::int32_t> own_boxes(const TensorView& regions, const TensorView& boxes) {
  std::vector<std::int32_t> own;
  for (std::int64_t i = 0; i < regions.shape[0]; ++i) {
    const auto* box =
        boxes.as<const std::int32_t>() + kBoundsSize * regions.as<const std::int32_t>()[i];
    own.insert(own.end(), box, box + 4);
  }
  return own;
}

// A copy of an array in host memory: another thread may write to that between check and use.
TensorView held_apart(const TensorView& array, std::vector<std::int32_t>& copy) {
  if (array.device.is_cuda() || array.dtype != DType::int32) {
    return array;
  }
  const auto* values = array.as<const std::int32_t>();
  copy.assign(values, values + array.count());
  TensorView own = array;
  own.data = copy.data();
  return own;
}

}  // namespace

Shape mask_boxes_shape(const TensorView& mask_logits, std::int64_t height, std::int64_t width) {
  expect_masks(mask_logits);
  expect_sides("canvas_hw", height, width, kMaxCanvasSide, {height, width},
               "Pass (height, width).");
  return {mask_logits.shape[0], 5};
}

void mask_boxes(const TensorView& mask_logits, const TensorView& boxes, std::int64_t height,
                std::int64_t width, StreamHandle stream) {
  const Shape shape = mask_boxes_shape(mask_logits, height, width);
  expect_dtype("out", boxes, {DType::int32});
  expect_shape("out", boxes, shape);
  expect_same_device("out", boxes, "mask_logits", mask_logits);
  if (boxes.count() > 0) {
    ZSSEG_RUN_KERNEL(boxes, mask_boxes, stream, mask_logits, boxes, height, width);
  }
}

Shape crop_regions_shape(const TensorView& image, const TensorView& mask_logits,
                         const TensorView& regions, const TensorView& boxes,
                         const CropRegionsParams& params) {
  expect_dtype("image", image, {DType::float32});
  expect_shape("image", image, {3, kAnySize, kAnySize});
  expect_sides("image", image.shape[1], image.shape[2], kMaxCanvasSide, image.shape,
               "Resize it first.");
  expect_masks(mask_logits);
  expect_same_device("mask_logits", mask_logits, "image", image);
  expect_regions(mask_logits, regions);
  expect_boxes(image, mask_logits, regions, boxes);
  if (params.side < 1 || params.side > kMaxCropSide) {
    fail_argument("side", "from 1 to " + std::to_string(kMaxCropSide), std::to_string(params.side));
  }
  for (int plane = 0; plane < 3; ++plane) {
    if (!std::isfinite(params.scale[plane])) {
      fail_argument("scale", "3 finite numbers", to_text(params.scale[plane]));
    }
    if (!std::isfinite(params.offset[plane])) {
      fail_argument("offset", "3 finite numbers", to_text(params.offset[plane]));
    }
  }
  return {regions.shape[0], 3, params.side, params.side};
}

void crop_regions(const TensorView& image, const TensorView& mask_logits,
                  const TensorView& given_regions, const TensorView& given_boxes,
                  const TensorView& out, const CropRegionsParams& params, StreamHandle stream) {
  std::vector<std::int32_t> own_regions, bounds;
  const TensorView regions = held_apart(given_regions, own_regions);
  const TensorView boxes = held_apart(given_boxes, bounds);
  const Shape shape = crop_regions_shape(image, mask_logits, regions, boxes, params);
  expect_dtype("out", out, {DType::float32});
  expect_shape("out", out, shape);
  expect_same_device("out", out, "image", image);
  if (out.count() == 0) {
    return;
  }
  if (regions.device.is_cuda() || !is_of_every_mask(boxes)) {
    ZSSEG_RUN_KERNEL(out, crop_regions, stream, image, mask_logits, regions, boxes, out, params);
    return;
  }
  std::vector<std::int32_t> corners = own_boxes(regions, boxes);
  TensorView own = boxes;
  own.data = corners.data();
  own.shape = {regions.shape[0], 4};
  ZSSEG_RUN_KERNEL(out, crop_regions, stream, image, mask_logits, regions, own, out, params);
}

}  // namespace zsseg
