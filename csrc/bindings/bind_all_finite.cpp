#include <pybind11/pybind11.h>

#include "bindings/array_arg.h"
#include "bindings/register.h"
#include "zsseg/ops/all_finite.h"

namespace py = pybind11;

namespace zsseg::bindings {
namespace {

py::object bound_all_finite(const py::object& values, const py::object& out, StreamHandle stream) {
  const ArrayArg values_arg = ArrayArg::input(values, "values", stream);
  const OutputArg result(out, "out", all_finite_shape(values_arg.view()), DType::uint8,
                         values_arg.view().device, stream);
  expect_apart({result}, {values_arg});
  {
    const py::gil_scoped_release unlocked;
    all_finite(values_arg.view(), result.view(), stream);
  }
  return result.result();
}

}  // namespace

void register_all_finite(py::module_& module) {
  module.def("all_finite", &bound_all_finite, py::arg("values"), py::arg("out"), py::arg("stream"));
}

}  // namespace zsseg::bindings
