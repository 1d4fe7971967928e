#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "bindings/array_arg.h"
#include "bindings/register.h"
#include "zsseg/ops/move_labels.h"

namespace py = pybind11;

namespace zsseg::bindings {
namespace {

void bound_move_labels(const py::object& labels, const py::object& flow, const py::object& refined,
                       const py::object& start, const py::object& now,
                       const std::array<int, 3>& limits, const py::object& out,
                       const py::object& out_flow) {
  const ArrayArg labels_arg = ArrayArg::input(labels, "labels", 0);
  const ArrayArg flow_arg = ArrayArg::input(flow, "flow", 0);
  const auto refined_arg = ArrayArg::optional_input(refined, "refined", 0);
  const ArrayArg start_arg = ArrayArg::input(start, "start", 0);
  const ArrayArg now_arg = ArrayArg::input(now, "now", 0);
  const ArrayArg out_arg = ArrayArg::output(out, "out", 0);
  const ArrayArg out_flow_arg = ArrayArg::output(out_flow, "out_flow", 0);
  expect_apart({out_arg, out_flow_arg}, {labels_arg, flow_arg, refined_arg, start_arg, now_arg});
  const MoveLabels arrays{labels_arg.view(),  flow_arg.view(), view_or_none(refined_arg),
                          start_arg.view(),   now_arg.view(),  out_arg.view(),
                          out_flow_arg.view()};
  const py::gil_scoped_release unlocked;
  move_labels(arrays, {limits[0], limits[1], limits[2]});
}

}  // namespace

void register_move_labels(py::module_& module) {
  module.def("move_labels", &bound_move_labels, py::arg("labels"), py::arg("flow"),
             py::arg("refined"), py::arg("start"), py::arg("now"), py::arg("limits"),
             py::arg("out"), py::arg("out_flow"));
}

}  // namespace zsseg::bindings
