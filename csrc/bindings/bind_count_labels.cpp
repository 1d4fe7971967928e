#include <pybind11/pybind11.h>

#include "bindings/array_arg.h"
#include "bindings/register.h"
#include "zsseg/ops/count_labels.h"

namespace py = pybind11;

namespace zsseg::bindings {
namespace {

py::object bound_count_labels(const py::object& labels, std::int64_t num_classes,
                              const py::object& out, StreamHandle stream) {
  const ArrayArg labels_arg = ArrayArg::input(labels, "labels", stream);
  const OutputArg result(out, "out", count_labels_shape(labels_arg.view(), num_classes),
                         DType::int64, labels_arg.view().device, stream);
  expect_apart({result}, {labels_arg});
  {
    const py::gil_scoped_release unlocked;
    count_labels(labels_arg.view(), num_classes, result.view(), stream);
  }
  return result.result();
}

}  // namespace

void register_count_labels(py::module_& module) {
  module.def("count_labels", &bound_count_labels, py::arg("labels"), py::arg("num_classes"),
             py::arg("out"), py::arg("stream"));
}

}  // namespace zsseg::bindings
