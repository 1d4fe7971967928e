// From the core's arrays to Python: NumPy arrays, and DeviceArray with DLPack and
// __cuda_array_interface__.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "zsseg/tensor_view.h"

namespace zsseg::bindings {

pybind11::array new_numpy_array(const Shape& shape, DType dtype);  // uninitialised
pybind11::dtype numpy_dtype(DType dtype);
pybind11::tuple shape_tuple(const Shape& shape);

// Throws DTypeError for what the core has no element type for.
DType parse_dtype(const pybind11::object& dtype);

// Throws ShapeError for more than Shape::kMaxRank or negative sizes.
Shape parse_shape(const pybind11::object& shape);

void register_device_array(pybind11::module_& module);

}  // namespace zsseg::bindings
