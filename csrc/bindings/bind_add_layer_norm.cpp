#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "bindings/array_arg.h"
#include "bindings/register.h"
#include "zsseg/check.h"
#include "zsseg/ops/add_layer_norm.h"

namespace py = pybind11;

namespace zsseg::bindings {
namespace {

void expect_eps(const std::vector<float>& eps, std::int64_t norms) {
  const bool positive =
      std::all_of(eps.begin(), eps.end(), [](float one) { return one >= 0 && std::isfinite(one); });
  if (!positive || static_cast<std::int64_t>(eps.size()) != norms) {
    fail_argument("eps", std::to_string(norms) + " finite numbers of at least 0, one a norm",
                  positive ? std::to_string(eps.size()) : "others");
  }
}

py::object bound_add_layer_norm(const py::object& x, const py::object& y, const py::object& scale,
                                const py::object& shift, const std::vector<float>& eps,
                                const py::object& total, std::int64_t total_after,
                                const py::object& out, StreamHandle stream) {
  const ArrayArg x_arg = ArrayArg::input(x, "x", stream);
  const ArrayArg y_arg = ArrayArg::input(y, "y", stream);
  const ArrayArg scale_arg = ArrayArg::input(scale, "scale", stream);
  const ArrayArg shift_arg = ArrayArg::input(shift, "shift", stream);
  AddLayerNormArgs args{x_arg.view(),     y_arg.view(), scale_arg.view(),
                        shift_arg.view(), {},           total_after};
  const Shape shape = add_layer_norm_shape(args);
  expect_eps(eps, args.scale.shape[0]);
  std::copy(eps.begin(), eps.end(), args.eps);
  const OutputArg result(out, "out", shape, args.x.dtype, args.x.device, stream);
  const auto held_total = ArrayArg::optional_output(total, "total", stream);
  const AddLayerNormOutputs outputs{result.view(), view_or_none(held_total)};
  expect_apart({result, held_total}, {x_arg, y_arg, scale_arg, shift_arg});
  {
    const py::gil_scoped_release unlocked;
    add_layer_norm(args, outputs, stream);
  }
  return result.result();
}

}  // namespace

void register_add_layer_norm(py::module_& module) {
  module.def("add_layer_norm", &bound_add_layer_norm, py::arg("x"), py::arg("y"), py::arg("scale"),
             py::arg("shift"), py::arg("eps"), py::arg("total"), py::arg("total_after"),
             py::arg("out"), py::arg("stream"));
}

}  // namespace zsseg::bindings
