// Host memory that the GPU reaches.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <vector>

#include "bindings/array_export.h"
#include "bindings/register.h"
#include "zsseg/device_array.h"
#include "zsseg/pinned_block.h"

namespace py = pybind11;

namespace zsseg::bindings {
namespace {

struct PinnedArray {
  std::shared_ptr<PinnedBlock> block;
  Shape shape;
  DType dtype;
};

PinnedArray make_pinned(const py::object& sizes, const py::object& type, int device) {
  const Shape shape = parse_shape(sizes);
  const DType dtype = parse_dtype(type);
  const TensorView view{nullptr, dtype, shape, Device{}};
  return {PinnedBlock::create(view.bytes(), device), shape, dtype};
}

py::array host_view(const py::object& self) {
  const auto& array = self.cast<const PinnedArray&>();
  const Shape& shape = array.shape;
  return py::array(numpy_dtype(array.dtype),
                   std::vector<py::ssize_t>(shape.dims, shape.dims + shape.rank),
                   array.block->host(), self);
}

}  // namespace

void register_pinned(py::module_& module) {
  py::class_<PinnedArray>(module, "PinnedArray")
      .def(py::init(&make_pinned), py::arg("shape"), py::arg("dtype"), py::arg("device") = 0)
      .def_property_readonly("host", &host_view)
      .def(
          "mapped",
          [](const PinnedArray& array, StreamHandle stream) {
            return DeviceArray::over(array.block, array.shape, array.dtype, stream);
          },
          py::arg("stream") = 0)
      .def_property_readonly("shape",
                             [](const PinnedArray& array) { return shape_tuple(array.shape); })
      .def_property_readonly("dtype",
                             [](const PinnedArray& array) { return numpy_dtype(array.dtype); });
}

}  // namespace zsseg::bindings
