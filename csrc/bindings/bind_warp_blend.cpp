#include <pybind11/pybind11.h>

#include "bindings/array_arg.h"
#include "bindings/register.h"
#include "zsseg/ops/warp_blend.h"

namespace py = pybind11;

namespace zsseg::bindings {
namespace {

py::object bound_warp_blend(const py::object& logits, const py::object& past,
                            const py::object& flow, const py::object& past_weight,
                            const py::object& out, StreamHandle stream) {
  const ArrayArg logits_arg = ArrayArg::input(logits, "logits", stream);
  const ArrayArg past_arg = ArrayArg::input(past, "past", stream);
  const ArrayArg flow_arg = ArrayArg::input(flow, "flow", stream);
  const ArrayArg weight_arg = ArrayArg::input(past_weight, "past_weight", stream);
  const WarpBlendArgs args{logits_arg.view(), past_arg.view(), flow_arg.view(), weight_arg.view()};
  const OutputArg result(out, "out", warp_blend_shape(args), DType::float32,
                         logits_arg.view().device, stream);
  expect_apart({result},
               {CallArray(logits_arg).or_in_place(result), past_arg, flow_arg, weight_arg});
  {
    const py::gil_scoped_release unlocked;
    warp_blend(args, result.view(), stream);
  }
  return result.result();
}

}  // namespace

void register_warp_blend(py::module_& module) {
  module.def("warp_blend", &bound_warp_blend, py::arg("logits"), py::arg("past"), py::arg("flow"),
             py::arg("past_weight"), py::arg("out"), py::arg("stream"));
}

}  // namespace zsseg::bindings
