#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "bindings/array_arg.h"
#include "bindings/register.h"
#include "zsseg/check.h"
#include "zsseg/ops/crop_regions.h"

namespace py = pybind11;

namespace zsseg::bindings {
namespace {

regions::Style parse_style(const std::string& name) {
  if (name == "cropmask") {
    return regions::Style::kCropMask;
  }
  if (name == "crop") {
    return regions::Style::kCrop;
  }
  if (name != "mask") {
    fail_argument("style", "'cropmask', 'mask' or 'crop'", "'" + name + "'");
  }
  return regions::Style::kMask;
}

void copy_three(const char* name, const std::vector<double>& values, double* to) {
  if (values.size() != 3) {
    fail_argument(name, "3 finite numbers", std::to_string(values.size()) + " numbers");
  }
  for (int plane = 0; plane < 3; ++plane) {
    to[plane] = values[static_cast<std::size_t>(plane)];
  }
}

py::object bound_mask_boxes(const py::object& mask_logits,
                            std::pair<std::int64_t, std::int64_t> canvas_hw, const py::object& out,
                            StreamHandle stream) {
  const ArrayArg masks = ArrayArg::input(mask_logits, "mask_logits", stream);
  const Shape shape = mask_boxes_shape(masks.view(), canvas_hw.first, canvas_hw.second);
  const OutputArg result(out, "out", shape, DType::int32, masks.view().device, stream);
  expect_apart({result}, {masks});
  {
    const py::gil_scoped_release unlocked;
    mask_boxes(masks.view(), result.view(), canvas_hw.first, canvas_hw.second, stream);
  }
  return result.result();
}

py::object bound_crop_regions(const py::object& image, const py::object& mask_logits,
                              const py::object& regions, const py::object& boxes, std::int64_t side,
                              const std::string& style, const std::vector<double>& scale,
                              const std::vector<double>& offset, const py::object& out,
                              StreamHandle stream) {
  CropRegionsParams params;
  params.side = side;
  params.style = parse_style(style);
  copy_three("scale", scale, params.scale);
  copy_three("offset", offset, params.offset);
  const ArrayArg pixels = ArrayArg::input(image, "image", stream);
  const ArrayArg masks = ArrayArg::input(mask_logits, "mask_logits", stream);
  const ArrayArg indices = ArrayArg::input(regions, "regions", stream);
  const ArrayArg corners = ArrayArg::input(boxes, "boxes", stream);
  const Shape shape =
      crop_regions_shape(pixels.view(), masks.view(), indices.view(), corners.view(), params);
  const OutputArg result(out, "out", shape, DType::float32, pixels.view().device, stream);
  expect_apart({result}, {pixels, masks, indices, corners});
  {
    const py::gil_scoped_release unlocked;
    crop_regions(pixels.view(), masks.view(), indices.view(), corners.view(), result.view(), params,
                 stream);
  }
  return result.result();
}

}  // namespace

void register_crop_regions(py::module_& module) {
  module.def("mask_boxes", &bound_mask_boxes, py::arg("mask_logits"), py::arg("canvas_hw"),
             py::arg("out"), py::arg("stream"));
  module.def("crop_regions", &bound_crop_regions, py::arg("image"), py::arg("mask_logits"),
             py::arg("regions"), py::arg("boxes"), py::arg("side"), py::arg("style"),
             py::arg("scale"), py::arg("offset"), py::arg("out"), py::arg("stream"));
}

}  // namespace zsseg::bindings
