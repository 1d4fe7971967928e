#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <utility>

#include "bindings/align_arg.h"
#include "bindings/array_arg.h"
#include "bindings/lent_memory.h"
#include "bindings/register.h"
#include "zsseg/check.h"
#include "zsseg/ops/upsample_argmax.h"

namespace py = pybind11;

namespace zsseg::bindings {
namespace {

upsample::Activation parse_activation(const std::string& name) {
  if (name == "none") {
    return upsample::Activation::kNone;
  }
  if (name == "sigmoid") {
    return upsample::Activation::kSigmoid;
  }
  if (name != "softmax") {
    fail_argument("activation", "'none', 'sigmoid' or 'softmax'", "'" + name + "'");
  }
  return upsample::Activation::kSoftmax;
}

// The drawing of the labels, if any.
class OverlayArg {
 public:
  OverlayArg(const py::object& frame, const py::object& palette, double alpha,
             const py::object& picture, StreamHandle stream) {
    if (frame.is_none()) {
      return;
    }
    frame_.emplace(ArrayArg::input(frame, "frame", stream));
    palette_.emplace(ArrayArg::input(palette, "palette", stream));
    const TensorView& view = frame_->view();
    picture_.emplace(picture, "picture", view.shape, DType::uint8, view.device, stream);
    overlay_ = {view, palette_->view(), picture_->view(), alpha};
  }

  CallArray picture() const { return picture_; }
  CallArray frame() const { return CallArray(frame_).or_in_place(picture()); }
  CallArray palette() const { return palette_; }
  const LabelOverlay* overlay() const { return frame_ ? &overlay_ : nullptr; }
  py::object result() const { return picture_ ? picture_->result() : py::none(); }

  // Of the frame; what is no frame is refused with the other arguments.
  std::pair<std::int64_t, std::int64_t> size_hw() const {
    const Shape& shape = overlay_.frame.shape;
    return shape.rank == 3 ? std::pair(shape[0], shape[1])
                           : std::pair<std::int64_t, std::int64_t>(1, 1);
  }

 private:
  std::optional<ArrayArg> frame_, palette_;
  std::optional<OutputArg> picture_;
  LabelOverlay overlay_;
};

py::tuple bound_upsample_argmax(const py::object& logits,
                                std::optional<std::pair<std::int64_t, std::int64_t>> out_hw,
                                const std::string& activation, const py::object& seen,
                                double seen_bias, std::optional<double> unknown_below,
                                bool with_scores, const py::object& label_table,
                                const py::object& num_classes, const std::string& align,
                                const py::object& frame, const py::object& palette, double alpha,
                                const py::object& out, const py::object& picture,
                                const py::object& workspace, StreamHandle stream) {
  const ArrayArg logits_arg = ArrayArg::input(logits, "logits", stream);
  const TensorView& view = logits_arg.view();
  const auto seen_arg = ArrayArg::optional_input(seen, "seen", stream);
  const auto table_arg = ArrayArg::optional_input(label_table, "label_table", stream);
  const auto count_arg = ArrayArg::optional_input(num_classes, "num_classes", stream);
  const OverlayArg overlay_arg(frame, palette, alpha, picture, stream);
  const UpsampleArgmaxInputs inputs{view, view_or_null(seen_arg), view_or_null(table_arg),
                                    view_or_null(count_arg), overlay_arg.overlay()};
  const auto [height, width] = out_hw ? *out_hw : overlay_arg.size_hw();
  const float no_threshold = -std::numeric_limits<float>::infinity();
  const UpsampleArgmaxParams params{
      height,
      width,
      parse_activation(activation),
      static_cast<float>(seen_bias),
      unknown_below ? static_cast<float>(*unknown_below) : no_threshold,
      parse_align(align)};
  const Shape shape = upsample_argmax_shape(inputs, params);
  const auto [labels_out, scores_out] = label_results(out, with_scores);
  const OutputArg labels(labels_out, "labels", shape, upsample_argmax_label_dtype(inputs),
                         view.device, stream);
  std::optional<OutputArg> scores;
  if (with_scores) {
    scores.emplace(scores_out, "scores", shape, DType::float32, view.device, stream);
  }
  const ScratchMemory scratch(
      workspace, view.device.is_cuda() ? 0 : upsample_argmax_workspace_bytes(inputs, params),
      view.device, stream);
  expect_apart(
      {labels, scores, overlay_arg.picture(), scratch.lent()},
      {logits_arg, seen_arg, table_arg, count_arg, overlay_arg.frame(), overlay_arg.palette()});
  {
    const py::gil_scoped_release unlocked;
    upsample_argmax(inputs, labels.view(), scores ? &scores->view() : nullptr, scratch.view(),
                    params, stream);
  }
  return py::make_tuple(labels.result(), scores ? scores->result() : py::none(),
                        overlay_arg.result());
}

}  // namespace

void register_upsample_argmax(py::module_& module) {
  module.def("upsample_argmax", &bound_upsample_argmax, py::arg("logits"), py::arg("out_hw"),
             py::arg("activation"), py::arg("seen"), py::arg("seen_bias"), py::arg("unknown_below"),
             py::arg("with_scores"), py::arg("label_table"), py::arg("num_classes"),
             py::arg("align"), py::arg("frame"), py::arg("palette"), py::arg("alpha"),
             py::arg("out"), py::arg("picture"), py::arg("workspace"), py::arg("stream"));
}

}  // namespace zsseg::bindings
