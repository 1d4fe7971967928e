#include <pybind11/pybind11.h>

#include "bindings/array_arg.h"
#include "bindings/register.h"
#include "zsseg/ops/overlay.h"

namespace py = pybind11;

namespace zsseg::bindings {
namespace {

py::object bound_overlay(const py::object& frame, const py::object& labels,
                         const py::object& palette, double alpha, const py::object& out,
                         StreamHandle stream) {
  const ArrayArg frame_arg = ArrayArg::input(frame, "frame", stream);
  const ArrayArg labels_arg = ArrayArg::input(labels, "labels", stream);
  const ArrayArg palette_arg = ArrayArg::input(palette, "palette", stream);
  const OverlayParams params{alpha};
  const Shape shape =
      overlay_shape(frame_arg.view(), labels_arg.view(), palette_arg.view(), params);
  const OutputArg result(out, "out", shape, DType::uint8, frame_arg.view().device, stream);
  expect_apart({result}, {CallArray(frame_arg).or_in_place(result), labels_arg, palette_arg});
  {
    const py::gil_scoped_release unlocked;
    overlay(frame_arg.view(), labels_arg.view(), palette_arg.view(), result.view(), params, stream);
  }
  return result.result();
}

}  // namespace

void register_overlay(py::module_& module) {
  module.def("overlay", &bound_overlay, py::arg("frame"), py::arg("labels"), py::arg("palette"),
             py::arg("alpha"), py::arg("out"), py::arg("stream"));
}

}  // namespace zsseg::bindings
