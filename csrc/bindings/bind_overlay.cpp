#include <pybind11/pybind11.h>

#include <string>

#include "bindings/array_arg.h"
#include "bindings/frame_arg.h"
#include "bindings/register.h"
#include "zsseg/ops/overlay.h"

namespace py = pybind11;

namespace zsseg::bindings {
namespace {

py::object bound_overlay(const py::object& frame, const py::object& labels,
                         const py::object& palette, double alpha, const std::string& channel_order,
                         const std::string& colour_matrix, const py::object& out,
                         StreamHandle stream) {
  const FrameArg frame_arg(frame, stream);
  const ArrayArg labels_arg = ArrayArg::input(labels, "labels", stream);
  const ArrayArg palette_arg = ArrayArg::input(palette, "palette", stream);
  const OverlayParams params{alpha, parse_matrix(colour_matrix), is_bgr(channel_order)};
  const CameraFrame view = frame_arg.view();
  const Shape shape = overlay_shape(view, labels_arg.view(), palette_arg.view(), params);
  const OutputArg result(out, "out", shape, DType::uint8, view.pixels.device, stream);
  const CallArray pixels =
      frame_arg.is_planes() ? frame_arg.pixels() : frame_arg.pixels().or_in_place(result);
  expect_apart({result}, {pixels, frame_arg.chroma(), labels_arg, palette_arg});
  {
    const py::gil_scoped_release unlocked;
    overlay(view, labels_arg.view(), palette_arg.view(), result.view(), params, stream);
  }
  return result.result();
}

}  // namespace

void register_overlay(py::module_& module) {
  module.def("overlay", &bound_overlay, py::arg("frame"), py::arg("labels"), py::arg("palette"),
             py::arg("alpha"), py::arg("channel_order"), py::arg("colour_matrix"), py::arg("out"),
             py::arg("stream"));
}

}  // namespace zsseg::bindings
