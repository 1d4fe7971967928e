#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <optional>
#include <utility>

#include "bindings/array_arg.h"
#include "bindings/lent_memory.h"
#include "bindings/register.h"
#include "zsseg/ops/label_regions.h"

namespace py = pybind11;

namespace zsseg::bindings {
namespace {

using Size = std::pair<std::int64_t, std::int64_t>;

py::tuple bound_label_regions(const py::object& mask_logits, const py::object& class_scores,
                              Size canvas_hw, Size out_hw, const py::object& bias,
                              std::optional<double> unknown_below, bool with_scores,
                              const py::object& out, const py::object& workspace,
                              StreamHandle stream) {
  const ArrayArg masks = ArrayArg::input(mask_logits, "mask_logits", stream);
  const ArrayArg weights = ArrayArg::input(class_scores, "class_scores", stream);
  const auto lowered = ArrayArg::optional_input(bias, "bias", stream);
  const LabelRegionsInputs inputs{masks.view(), weights.view(), view_or_null(lowered)};
  const float no_threshold = -std::numeric_limits<float>::infinity();
  const LabelRegionsParams params{
      canvas_hw.first, canvas_hw.second, out_hw.first, out_hw.second,
      unknown_below ? static_cast<float>(*unknown_below) : no_threshold};
  const Shape shape = label_regions_shape(inputs, params);
  const Device device = masks.view().device;
  const auto [labels_out, scores_out] = label_results(out, with_scores);
  const OutputArg labels(labels_out, "labels", shape, label_regions_dtype(inputs), device, stream);
  std::optional<OutputArg> scores;
  if (with_scores) {
    scores.emplace(scores_out, "scores", shape, DType::float32, device, stream);
  }
  const ScratchMemory scratch(workspace, label_regions_workspace_bytes(inputs, params), device,
                              stream);
  expect_apart({labels, scores, scratch.lent()}, {masks, weights, lowered});
  {
    const py::gil_scoped_release unlocked;
    label_regions(inputs, labels.view(), scores ? &scores->view() : nullptr, scratch.view(), params,
                  stream);
  }
  return py::make_tuple(labels.result(), scores ? scores->result() : py::none());
}

}  // namespace

void register_label_regions(py::module_& module) {
  module.def("label_regions", &bound_label_regions, py::arg("mask_logits"), py::arg("class_scores"),
             py::arg("canvas_hw"), py::arg("out_hw"), py::arg("bias"), py::arg("unknown_below"),
             py::arg("with_scores"), py::arg("out"), py::arg("workspace"), py::arg("stream"));
  module.def("label_regions_device_bytes", &label_regions_device_bytes, py::arg("num_classes"),
             py::arg("num_regions"));
}

}  // namespace zsseg::bindings
