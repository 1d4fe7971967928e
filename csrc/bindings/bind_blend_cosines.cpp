#include <pybind11/pybind11.h>

#include <string>

#include "bindings/array_arg.h"
#include "bindings/register.h"
#include "zsseg/check.h"
#include "zsseg/ops/blend_cosines.h"

namespace py = pybind11;

namespace zsseg::bindings {
namespace {

blend::Activation parse_blend_activation(const std::string& name) {
  if (name == "sigmoid") {
    return blend::Activation::kSigmoid;
  }
  if (name != "softmax") {
    fail_argument("activation", "'sigmoid' or 'softmax'", "'" + name + "'");
  }
  return blend::Activation::kSoftmax;
}

py::object bound_blend_cosines(const py::object& mask_logits, const py::object& cosines,
                               const py::object& weights, const py::object& shares,
                               const std::string& activation, const py::object& out,
                               const py::object& finite, const py::object& workspace,
                               StreamHandle stream) {
  const blend::Activation parsed = parse_blend_activation(activation);
  const ArrayArg logits_arg = ArrayArg::input(mask_logits, "mask_logits", stream);
  const ArrayArg cosines_arg = ArrayArg::input(cosines, "cosines", stream);
  const ArrayArg weights_arg = ArrayArg::input(weights, "weights", stream);
  const ArrayArg shares_arg = ArrayArg::input(shares, "shares", stream);
  const BlendCosinesArgs args{logits_arg.view(), cosines_arg.view(), weights_arg.view(),
                              shares_arg.view(), parsed};
  const OutputArg result(out, "out", blend_cosines_shape(args), DType::float32,
                         logits_arg.view().device, stream);
  const auto held_finite = ArrayArg::optional_output(finite, "finite", stream);
  const auto held_workspace = ArrayArg::optional_output(workspace, "workspace", stream);
  const FiniteCheck check{view_or_none(held_finite), view_or_none(held_workspace)};
  expect_apart({result, held_finite, held_workspace},
               {CallArray(logits_arg).or_in_place(result),
                CallArray(cosines_arg).or_in_place(result), weights_arg, shares_arg});
  {
    const py::gil_scoped_release unlocked;
    blend_cosines(args, result.view(), stream, check);
  }
  return result.result();
}

}  // namespace

void register_blend_cosines(py::module_& module) {
  module.def("blend_cosines", &bound_blend_cosines, py::arg("mask_logits"), py::arg("cosines"),
             py::arg("weights"), py::arg("shares"), py::arg("activation"), py::arg("out"),
             py::arg("finite"), py::arg("workspace"), py::arg("stream"));
}

}  // namespace zsseg::bindings
