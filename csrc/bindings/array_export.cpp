#include "bindings/array_export.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/array_arg.h"
#include "bindings/dlpack_abi.h"
#include "zsseg/check.h"
#include "zsseg/cuda_runtime.h"
#include "zsseg/device_array.h"
#include "zsseg/error.h"
#include "zsseg/half.h"

namespace py = pybind11;

namespace zsseg::bindings {
namespace {

constexpr DType kNumpyTypes[] = {DType::boolean, DType::uint8,  DType::int8,  DType::uint16,
                                 DType::int16,   DType::int32,  DType::int64, DType::float16,
                                 DType::float32, DType::float64};

// b, u, i, f as in typestr; V, as NumPy writes the types that others add to it, for bfloat16.
char kind_of(DType dtype) {
  return dtype == DType::bfloat16 ? 'V' : name_of(dtype)[0];
}

dlpack::DataType dlpack_type(DType dtype) {
  const auto bits = static_cast<std::uint8_t>(8 * size_of(dtype));
  switch (kind_of(dtype)) {
    case 'b':
      return {dlpack::kBool, bits, 1};
    case 'u':
      return {dlpack::kUInt, bits, 1};
    case 'i':
      return {dlpack::kInt, bits, 1};
    case 'V':
      return {dlpack::kBfloat, bits, 1};
    default:
      return {dlpack::kFloat, bits, 1};
  }
}

constexpr std::int64_t kNoSynchronisation = -1;

StreamHandle handle_of(std::int64_t dlpack_stream) {
  return dlpack_stream == 1 ? 0 : static_cast<StreamHandle>(dlpack_stream);
}

// Lent to a DLPack consumer: the array (its memory) and the sizes the tensor points to.
template <typename Managed>
struct Exported {
  DeviceArray array;
  Shape shape;
  std::int64_t consumer;  // its stream, as DLPack numbers them
  Managed managed;

  // The memory may be freed on our stream next: that must wait for the consumer's work.
  void wait_for_consumer() const noexcept {
    if (consumer != kNoSynchronisation) {
      array.wait_for(handle_of(consumer));
    }
  }
};

template <typename Managed>
std::unique_ptr<Exported<Managed>> export_tensor(const DeviceArray& array, std::int64_t consumer) {
  auto exported = std::make_unique<Exported<Managed>>(
      Exported<Managed>{array, array.view().shape, consumer, Managed{}});
  const TensorView& view = array.view();
  exported->managed.dl_tensor = {view.data,
                                 {dlpack::kCUDA, view.device.index},
                                 view.shape.rank,
                                 dlpack_type(view.dtype),
                                 exported->shape.dims,
                                 nullptr,
                                 0};
  exported->managed.manager_ctx = exported.get();
  exported->managed.deleter = [](Managed* self) {
    auto* owner = static_cast<Exported<Managed>*>(self->manager_ctx);
    owner->wait_for_consumer();
    delete owner;
  };
  return exported;
}

// The capsule frees the tensor only if no consumer took (and renamed) it.
template <typename Managed, const char* kCapsuleName>
py::capsule capsule_of(std::unique_ptr<Exported<Managed>> exported) {
  PyObject* capsule = PyCapsule_New(&exported->managed, kCapsuleName, [](PyObject* self) {
    if (PyCapsule_IsValid(self, kCapsuleName) != 0) {
      auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(self, kCapsuleName));
      managed->deleter(managed);
    }
  });
  if (capsule == nullptr) {
    throw py::error_already_set();
  }
  static_cast<void>(exported.release());
  return py::reinterpret_steal<py::capsule>(capsule);
}

py::capsule to_dlpack(const DeviceArray& array, const std::optional<std::int64_t>& stream,
                      const std::optional<std::pair<int, int>>& max_version,
                      const std::optional<std::pair<int, int>>& dl_device,
                      const std::optional<bool>& copy) {
  const int device = array.view().device.index;
  if (dl_device && *dl_device != std::make_pair<int, int>(dlpack::kCUDA, int{device})) {
    throw py::buffer_error("dl_device: expected this array's own device. Use numpy() to copy it.");
  }
  if (copy.value_or(false)) {
    throw py::buffer_error("copy: expected False or None. Copy on the consumer's side.");
  }
  const std::int64_t consumer = stream.value_or(1);
  if (consumer != kNoSynchronisation) {
    array.lend_to(handle_of(consumer));
  }
  if (max_version && max_version->first >= 1) {
    auto exported = export_tensor<dlpack::ManagedTensorVersioned>(array, consumer);
    exported->managed.version = {1, 0};
    return capsule_of<dlpack::ManagedTensorVersioned, dlpack::kVersionedName>(std::move(exported));
  }
  return capsule_of<dlpack::ManagedTensor, dlpack::kName>(
      export_tensor<dlpack::ManagedTensor>(array, consumer));
}

py::dict cuda_array_interface(const DeviceArray& array) {
  const TensorView& view = array.view();
  array.used();  // by whoever takes the address
  const StreamHandle stream = array.last_stream();
  const char order = size_of(view.dtype) == 1 ? '|' : '<';
  py::dict fields;
  fields["version"] = 3;
  fields["shape"] = shape_tuple(view.shape);
  fields["typestr"] =
      order + std::string(1, kind_of(view.dtype)) + std::to_string(size_of(view.dtype));
  fields["data"] = py::make_tuple(reinterpret_cast<std::uintptr_t>(view.data), false);
  fields["strides"] = py::none();
  fields["stream"] = stream == 0 ? 1 : stream;
  return fields;
}

void expect_like(const char* name, const TensorView& view, const TensorView& array) {
  expect_dtype(name, view, {array.dtype});
  expect_shape(name, view, array.shape);
}

void copy_from(const DeviceArray& array, const py::object& source, StreamHandle stream) {
  const ArrayArg from = ArrayArg::input(source, "array", stream);
  const TensorView& to = array.view();
  expect_like("array", from.view(), to);
  const int device = to.device.index;
  array.use_on(stream);
  const py::gil_scoped_release unlocked;
  if (from.view().device.is_cuda()) {
    cuda::copy_on_device(to.data, from.view().data, to.bytes(), device, stream);
  } else {
    cuda::copy_to_device(to.data, from.view().data, to.bytes(), device, stream);
  }
  array.used();
}

void copy_to_view(const DeviceArray& array, const TensorView& to, StreamHandle stream,
                  bool wait = true) {
  expect_like("out", to, array.view());
  if (to.device.is_cuda()) {
    throw DeviceError("out: expected an array on the CPU, got " + to_string(to.device) +
                      ". Use copy_from of the other array.");
  }
  if (!wait && to.count() > 0 && !cuda::is_pinned(to.data, array.view().device.index)) {
    throw DeviceError(
        "out: expected pinned memory where wait is False, got pageable memory. Use "
        "PinnedArray.host, or wait.");
  }
  const int device = array.view().device.index;
  array.use_on(stream);
  const py::gil_scoped_release unlocked;
  cuda::copy_to_host(to.data, array.view().data, to.bytes(), device, stream);
  array.used();
  if (wait) {
    synchronize(stream, device);
  }
}

// NumPy has no bfloat16; float32 holds the same values.
py::array bfloat16_to_numpy(const DeviceArray& array, StreamHandle stream) {
  const TensorView& view = array.view();
  std::vector<Bfloat16> values(static_cast<std::size_t>(view.count()));
  copy_to_view(array, TensorView{values.data(), view.dtype, view.shape, {}}, stream);
  py::array result = new_numpy_array(view.shape, DType::float32);
  std::transform(values.begin(), values.end(), static_cast<float*>(result.mutable_data()),
                 bfloat16_to_float);
  return result;
}

py::array to_numpy(const DeviceArray& array, StreamHandle stream) {
  if (array.view().dtype == DType::bfloat16) {
    return bfloat16_to_numpy(array, stream);
  }
  py::array result = new_numpy_array(array.view().shape, array.view().dtype);
  copy_to_view(array, TensorView{result.mutable_data(), array.view().dtype, array.view().shape, {}},
               stream);
  return result;
}

DeviceArray from_numpy(const py::object& source, int device, StreamHandle stream) {
  const ArrayArg from = ArrayArg::input(source, "array", stream);
  if (from.view().dtype == DType::other) {
    throw DTypeError(
        "array: expected a boolean, integer or floating type of at most 8 bytes, got another type. "
        "Convert it first.");
  }
  const DeviceArray array =
      DeviceArray::empty(from.view().shape, from.view().dtype, device, stream);
  copy_from(array, source, stream);
  return array;
}

std::string describe(const DeviceArray& array) {
  const TensorView& view = array.view();
  return "DeviceArray(shape=" + to_string(view.shape) + ", dtype=" + name_of(view.dtype) +
         ", device=" + to_string(view.device) + ")";
}

}  // namespace

py::dtype numpy_dtype(DType dtype) {
  return py::dtype(std::string(name_of(dtype)));
}

py::tuple shape_tuple(const Shape& shape) {
  py::tuple sizes(shape.rank);
  for (int axis = 0; axis < shape.rank; ++axis) {
    sizes[axis] = shape[axis];
  }
  return sizes;
}

py::array new_numpy_array(const Shape& shape, DType dtype) {
  return py::array(numpy_dtype(dtype),
                   std::vector<py::ssize_t>(shape.dims, shape.dims + shape.rank));
}

DType parse_dtype(const py::object& dtype) {
  if (py::isinstance<py::str>(dtype) && dtype.cast<std::string>() == name_of(DType::bfloat16)) {
    return DType::bfloat16;
  }
  const auto name = py::dtype::from_args(dtype).attr("name").cast<std::string>();
  for (const DType type : kNumpyTypes) {
    if (name == name_of(type)) {
      return type;
    }
  }
  throw DTypeError("dtype: expected a boolean, integer or floating type of at most 8 bytes, got " +
                   name + ". Convert it first.");
}

Shape parse_shape(const py::object& sizes) {
  const auto values = sizes.cast<std::vector<std::int64_t>>();
  Shape shape;
  for (const std::int64_t size : values) {
    if (values.size() > Shape::kMaxRank || size < 0) {
      throw ShapeError("shape: expected at most 4 sizes from 0 up, got " +
                       py::str(sizes).cast<std::string>() + ". Reshape it.");
    }
    shape.dims[shape.rank++] = size;
  }
  return shape;
}

void register_device_array(py::module_& module) {
  const py::object none = py::none();
  py::class_<DeviceArray>(module, "DeviceArray")
      .def_static(
          "empty",
          [](const py::object& shape, const py::object& dtype, int device, StreamHandle stream) {
            return DeviceArray::empty(parse_shape(shape), parse_dtype(dtype), device, stream);
          },
          py::arg("shape"), py::arg("dtype"), py::arg("device") = 0, py::arg("stream") = 0)
      .def_static("from_numpy", &from_numpy, py::arg("array"), py::arg("device") = 0,
                  py::arg("stream") = 0)
      .def("copy_from", &copy_from, py::arg("array"), py::arg("stream") = 0)
      .def(
          "copy_to",
          [](const DeviceArray& array, const py::object& out, StreamHandle stream, bool wait) {
            const ArrayArg to = ArrayArg::output(out, "out", stream);
            copy_to_view(array, to.view(), stream, wait);
          },
          py::arg("out"), py::arg("stream") = 0, py::kw_only(), py::arg("wait") = true)
      .def("numpy", &to_numpy, py::arg("stream") = 0)
      .def(
          "view",
          [](const DeviceArray& array, const py::object& shape, std::int64_t first) {
            return array.viewed_as(parse_shape(shape), first);
          },
          py::arg("shape"), py::kw_only(), py::arg("first") = 0)
      .def_property_readonly(
          "shape", [](const DeviceArray& array) { return shape_tuple(array.view().shape); })
      .def_property_readonly("dtype",
                             [](const DeviceArray& array) -> py::object {
                               const DType dtype = array.view().dtype;
                               return dtype == DType::bfloat16 ? py::object(py::str(name_of(dtype)))
                                                               : py::object(numpy_dtype(dtype));
                             })
      .def_property_readonly(
          "device", [](const DeviceArray& array) { return to_string(array.view().device); })
      .def_property_readonly("nbytes",
                             [](const DeviceArray& array) { return array.view().bytes(); })
      .def_property_readonly("__cuda_array_interface__", &cuda_array_interface)
      .def("__dlpack__", &to_dlpack, py::kw_only(), py::arg("stream") = none,
           py::arg("max_version") = none, py::arg("dl_device") = none, py::arg("copy") = none)
      .def("__dlpack_device__",
           [](const DeviceArray& array) {
             return py::make_tuple(static_cast<int>(dlpack::kCUDA), array.view().device.index);
           })
      .def("__repr__", &describe);
}

}  // namespace zsseg::bindings
