#include <pybind11/pybind11.h>

#include <string>

#include "bindings/align_arg.h"
#include "bindings/array_arg.h"
#include "bindings/register.h"
#include "zsseg/ops/bilateral_upsample.h"

namespace py = pybind11;

namespace zsseg::bindings {
namespace {

py::object bound_bilateral_upsample(const py::object& logits, const py::object& guide, int scale,
                                    float reach, const std::string& align, const py::object& out,
                                    StreamHandle stream) {
  const ArrayArg logits_arg = ArrayArg::input(logits, "logits", stream);
  const ArrayArg guide_arg = ArrayArg::input(guide, "guide", stream);
  const BilateralUpsampleArgs args{logits_arg.view(), guide_arg.view(), scale, reach,
                                   parse_align(align)};
  const OutputArg result(out, "out", bilateral_upsample_shape(args), DType::float32,
                         logits_arg.view().device, stream);
  expect_apart({result}, {logits_arg, guide_arg});
  {
    const py::gil_scoped_release unlocked;
    bilateral_upsample(args, result.view(), stream);
  }
  return result.result();
}

}  // namespace

void register_bilateral_upsample(py::module_& module) {
  module.def("bilateral_upsample", &bound_bilateral_upsample, py::arg("logits"), py::arg("guide"),
             py::arg("scale"), py::arg("reach"), py::arg("align"), py::arg("out"),
             py::arg("stream"));
}

}  // namespace zsseg::bindings
