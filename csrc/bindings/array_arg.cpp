#include "bindings/array_arg.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <vector>

#include "bindings/array_export.h"
#include "bindings/dlpack_abi.h"
#include "zsseg/check.h"
#include "zsseg/cuda_capture.h"
#include "zsseg/cuda_runtime.h"
#include "zsseg/device_array.h"
#include "zsseg/error.h"

namespace py = pybind11;

namespace zsseg::bindings {
namespace {

Shape checked_shape(const char* name, const std::int64_t* sizes, int rank) {
  if (rank > Shape::kMaxRank) {
    throw ShapeError(std::string(name) + ": expected at most " + std::to_string(Shape::kMaxRank) +
                     " axes, got " + std::to_string(rank) + ". Reshape it.");
  }
  Shape shape;
  shape.rank = rank;
  for (int axis = 0; axis < rank; ++axis) {
    shape.dims[axis] = sizes[axis];
  }
  return shape;
}

// Kernels read elements where they lie, which the language allows at multiples of their size only.
void expect_aligned(const char* name, const TensorView& view) {
  const std::size_t item_bytes = size_of(view.dtype);
  const std::size_t past =
      item_bytes == 0 ? 0 : reinterpret_cast<std::uintptr_t>(view.data) % item_bytes;
  if (past == 0 || view.count() == 0) {
    return;
  }
  throw ShapeError(std::string(name) + ": expected an address that is a multiple of " +
                   std::to_string(item_bytes) + ", the size of its elements, got one " +
                   std::to_string(past) + " past a multiple. Copy it with numpy.array.");
}

void expect_writable(const char* name, bool read_only) {
  if (read_only) {
    throw ShapeError(std::string(name) +
                     ": expected a writable array, got a read-only one. Pass a copy.");
  }
}

DType dtype_from_format(const char* format, std::int64_t item_bytes) {
  std::string code = format == nullptr ? "B" : format;
  if (code.size() > 1 && std::strchr("@=<", code[0]) != nullptr) {
    code.erase(0, 1);
  }
  if (code.size() != 1) {
    return DType::other;
  }
  switch (code[0]) {
    case '?':
      return DType::boolean;
    case 'B':
      return DType::uint8;
    case 'b':
      return DType::int8;
    case 'H':
      return DType::uint16;
    case 'h':
      return DType::int16;
    case 'i':
    case 'l':
    case 'q':
      return item_bytes == 8 ? DType::int64 : DType::int32;
    case 'e':
      return DType::float16;
    case 'f':
      return DType::float32;
    case 'd':
      return DType::float64;
    default:
      return DType::other;
  }
}

DType dtype_from_code(char kind, std::int64_t bytes) {  // as in NumPy's typestr
  if (kind == 'b') {
    return DType::boolean;
  }
  if (kind == 'V') {
    return bytes == 2 ? DType::bfloat16 : DType::other;
  }
  for (const DType dtype : {DType::uint8, DType::int8, DType::uint16, DType::int16, DType::int32,
                            DType::int64, DType::float16, DType::float32, DType::float64}) {
    if (name_of(dtype)[0] == kind && static_cast<std::int64_t>(size_of(dtype)) == bytes) {
      return dtype;
    }
  }
  return DType::other;
}

DType dtype_from_dlpack(const dlpack::DataType& type) {
  if (type.lanes != 1) {
    return DType::other;
  }
  switch (type.code) {
    case dlpack::kInt:
      return dtype_from_code('i', type.bits / 8);
    case dlpack::kUInt:
      return dtype_from_code('u', type.bits / 8);
    case dlpack::kFloat:
      return dtype_from_code('f', type.bits / 8);
    case dlpack::kBool:
      return DType::boolean;
    case dlpack::kBfloat:
      return type.bits == 16 ? DType::bfloat16 : DType::other;
    default:
      return DType::other;
  }
}

struct BufferDeleter {
  void operator()(Py_buffer* buffer) const {
    PyBuffer_Release(buffer);
    delete buffer;
  }
};

struct ManagedTensorDeleter {
  template <typename Managed>
  void operator()(Managed* managed) const {
    if (managed->deleter != nullptr) {
      managed->deleter(managed);
    }
  }
};

Device device_from_dlpack(const char* name, const dlpack::Device& device) {
  switch (device.device_type) {
    case dlpack::kCPU:
    case dlpack::kCUDAHost:
      return Device{};
    case dlpack::kCUDA:
    case dlpack::kCUDAManaged:
      return Device{DeviceKind::cuda, device.device_id};
    default:
      throw DeviceError(std::string(name) +
                        ": expected an array on the CPU or on CUDA, got DLPack " + "device type " +
                        std::to_string(device.device_type) + ". Move it first.");
  }
}

// Calls __dlpack__ the way its specification asks, falling back for producers that predate 1.0.
py::object dlpack_capsule(py::handle object, bool on_cuda, StreamHandle stream) {
  py::dict arguments;
  // 1 is the legacy default stream; 0 is not allowed because it is ambiguous.
  arguments["stream"] = on_cuda ? py::object(py::int_(stream == 0 ? 1 : stream)) : py::none();
  py::dict versioned = arguments.attr("copy")();
  versioned["max_version"] = py::make_tuple(1, 0);
  const py::object method = object.attr("__dlpack__");
  try {
    return method(**versioned);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) {
      throw;
    }
  }
  return method(**arguments);
}

}  // namespace

ArrayArg::ArrayArg(py::handle object, const char* name, StreamHandle stream, bool writable,
                   bool may_be_pitched)
    : name_(name), may_be_pitched_(may_be_pitched) {
  if (take_device_array(object, name, stream) || take_buffer(object, name, writable) ||
      take_dlpack(object, name, stream, writable) ||
      take_cuda_array_interface(object, name, stream, writable)) {
    return;
  }
  throw DTypeError(std::string(name) + ": expected an array, got " +
                   Py_TYPE(object.ptr())->tp_name +
                   ". Pass a NumPy array or an object with __dlpack__ or "
                   "__cuda_array_interface__.");
}

// Axes of one element may have any stride.
void ArrayArg::take_strides(const char* name, const std::int64_t* strides, std::int64_t unit,
                            std::int64_t item_bytes) {
  const Shape& shape = view_.shape;
  std::int64_t expected = item_bytes;
  bool fits = true;
  for (int axis = shape.rank - 1; axis >= 0; --axis) {
    const std::int64_t stride =
        strides == nullptr || shape[axis] == 1 ? expected : strides[axis] * unit;
    if (axis == 0) {
      row_bytes_ = stride;
    }
    fits = fits && (axis == 0 && may_be_pitched_ ? stride >= expected : stride == expected);
    expected *= shape[axis];
  }
  if (fits || shape.count() == 0) {
    return;
  }
  Shape in_bytes = shape;
  for (int axis = 0; axis < shape.rank; ++axis) {
    in_bytes.dims[axis] = strides[axis] * unit;
  }
  const char* wanted = may_be_pitched_ ? "rows without gaps in them" : "a C-contiguous array";
  throw ShapeError(std::string(name) + ": expected " + wanted + ", got strides " +
                   to_string(in_bytes) + " in bytes. Copy it with numpy.ascontiguousarray.");
}

void ArrayArg::take_dlpack_tensor(const char* name, const dlpack::Tensor& tensor) {
  view_.device = device_from_dlpack(name, tensor.device);
  view_.dtype = dtype_from_dlpack(tensor.dtype);
  view_.shape = checked_shape(name, tensor.shape, tensor.ndim);
  view_.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  const std::int64_t item_bytes = tensor.dtype.bits * tensor.dtype.lanes / 8;
  take_strides(name, tensor.strides, item_bytes, item_bytes);
  expect_aligned(name, view_);
}

bool ArrayArg::take_device_array(py::handle object, const char* name, StreamHandle stream) {
  if (!py::isinstance<DeviceArray>(object)) {
    return false;
  }
  auto array = std::make_unique<DeviceArray>(object.cast<const DeviceArray&>());
  view_ = array->view();
  take_strides(name, nullptr, 1, static_cast<std::int64_t>(size_of(view_.dtype)));
  array->use_on(stream);
  keeps_alive_ = std::shared_ptr<DeviceArray>(array.release(), [](const DeviceArray* used) {
    used->used();
    delete used;
  });
  return true;
}

bool ArrayArg::take_buffer(py::handle object, const char* name, bool writable) {
  if (PyObject_CheckBuffer(object.ptr()) == 0) {
    return false;
  }
  auto filled = std::make_unique<Py_buffer>();
  if (PyObject_GetBuffer(object.ptr(), filled.get(), PyBUF_RECORDS_RO) != 0) {
    // NumPy refuses to describe dates and spans of time with a ValueError of its own.
    py::error_already_set error;
    if (!error.matches(PyExc_ValueError) && !error.matches(PyExc_BufferError)) {
      throw error;
    }
    throw DTypeError(std::string(name) + ": expected an array of numbers, got one that cannot be " +
                     "read (" + std::string(py::str(error.value())) + "). Convert it first.");
  }
  const std::shared_ptr<Py_buffer> buffer(filled.release(), BufferDeleter{});
  expect_writable(name, writable && buffer->readonly != 0);
  const std::vector<std::int64_t> sizes(buffer->shape, buffer->shape + buffer->ndim);
  const std::vector<std::int64_t> strides(buffer->strides, buffer->strides + buffer->ndim);
  view_.shape = checked_shape(name, sizes.data(), buffer->ndim);
  view_.dtype = dtype_from_format(buffer->format, buffer->itemsize);
  view_.data = buffer->buf;
  take_strides(name, strides.data(), 1, buffer->itemsize);
  expect_aligned(name, view_);
  keeps_alive_ = buffer;
  return true;
}

bool ArrayArg::take_dlpack(py::handle object, const char* name, StreamHandle stream,
                           bool writable) {
  if (!py::hasattr(object, "__dlpack__") || !py::hasattr(object, "__dlpack_device__")) {
    return false;
  }
  const auto place = object.attr("__dlpack_device__")().cast<std::pair<int, int>>();
  const Device device = device_from_dlpack(name, {place.first, place.second});
  // pybind11's own conversion throws a type_error, which ends processes with other such modules.
  const py::object exported = dlpack_capsule(object, device.is_cuda(), stream);
  const py::capsule capsule =
      py::isinstance<py::capsule>(exported) ? py::capsule(exported) : py::capsule();
  if (PyCapsule_IsValid(capsule.ptr(), dlpack::kVersionedName) != 0) {
    auto* managed = capsule.get_pointer<dlpack::ManagedTensorVersioned>();
    PyCapsule_SetName(capsule.ptr(), dlpack::kUsedVersionedName);
    const std::shared_ptr<dlpack::ManagedTensorVersioned> owner(managed, ManagedTensorDeleter{});
    if (managed->version.major != 1) {
      throw DTypeError(std::string(name) + ": expected DLPack 1.x, got " +
                       std::to_string(managed->version.major) + ".x. Convert it to NumPy first.");
    }
    expect_writable(name, writable && (managed->flags & dlpack::kReadOnlyFlag) != 0);
    take_dlpack_tensor(name, managed->dl_tensor);
    keeps_alive_ = owner;
    return true;
  }
  if (PyCapsule_IsValid(capsule.ptr(), dlpack::kName) == 0) {
    throw DTypeError(std::string(name) +
                     ": expected __dlpack__ to give a fresh DLPack capsule, "
                     "got another object. Convert it to NumPy first.");
  }
  auto* managed = capsule.get_pointer<dlpack::ManagedTensor>();
  PyCapsule_SetName(capsule.ptr(), dlpack::kUsedName);
  const std::shared_ptr<dlpack::ManagedTensor> owner(managed, ManagedTensorDeleter{});
  take_dlpack_tensor(name, managed->dl_tensor);
  keeps_alive_ = owner;
  return true;
}

bool ArrayArg::take_cuda_array_interface(py::handle object, const char* name, StreamHandle stream,
                                         bool writable) {
  if (!py::hasattr(object, "__cuda_array_interface__")) {
    return false;
  }
  const py::dict fields = object.attr("__cuda_array_interface__");
  const auto data = fields["data"].cast<std::pair<std::uintptr_t, bool>>();
  expect_writable(name, writable && data.second);
  const auto sizes = fields["shape"].cast<std::vector<std::int64_t>>();
  const auto type = fields["typestr"].cast<std::string>();
  const std::int64_t item_bytes = type.size() > 2 ? std::stoll(type.substr(2)) : 0;
  view_.shape = checked_shape(name, sizes.data(), static_cast<int>(sizes.size()));
  view_.dtype =
      type.size() > 2 && type[0] != '>' ? dtype_from_code(type[1], item_bytes) : DType::other;
  view_.data = reinterpret_cast<void*>(data.first);
  std::vector<std::int64_t> strides;
  if (fields.contains("strides") && !fields["strides"].is_none()) {
    strides = fields["strides"].cast<std::vector<std::int64_t>>();
  }
  take_strides(name, strides.empty() ? nullptr : strides.data(), 1, item_bytes);
  expect_aligned(name, view_);
  // An empty array may have no address; any device then does.
  view_.device = view_.count() == 0 && view_.data == nullptr ? Device{DeviceKind::cuda, 0}
                                                             : cuda::device_of(view_.data);
  if (fields.contains("stream") && !fields["stream"].is_none() && view_.device.is_cuda()) {
    cuda::order_streams(fields["stream"].cast<StreamHandle>(), stream, view_.device.index);
  }
  keeps_alive_ = std::make_shared<py::object>(py::reinterpret_borrow<py::object>(object));
  return true;
}

OutputArg::OutputArg(const py::object& out, const char* name, const Shape& shape, DType dtype,
                     const Device& device, StreamHandle stream)
    : name_(name) {
  if (!out.is_none()) {
    array_ = std::make_shared<ArrayArg>(ArrayArg::output(out, name, stream));
    view_ = array_->view();
    result_ = out;
  } else if (device.is_cuda()) {
    result_ = py::cast(DeviceArray::empty(shape, dtype, device.index, stream));
    array_ = std::make_shared<ArrayArg>(ArrayArg::output(result_, name, stream));
    view_ = array_->view();
  } else {
    py::array array = new_numpy_array(shape, dtype);
    view_ = TensorView{array.mutable_data(), dtype, shape, device};
    result_ = std::move(array);
  }
}

CallArray::CallArray(const ArrayArg& array)
    : name_(array.name()), begin_(reinterpret_cast<std::uintptr_t>(array.view().data)) {
  const TensorView& view = array.view();
  if (view.count() > 0) {
    const std::int64_t rows = view.shape.rank == 0 ? 1 : view.shape[0];
    end_ = begin_ + view.bytes() / static_cast<std::uintptr_t>(rows) +
           static_cast<std::uintptr_t>((rows - 1) * array.row_bytes());
  }
}

CallArray::CallArray(const OutputArg& array)
    : name_(array.name()),
      begin_(reinterpret_cast<std::uintptr_t>(array.view().data)),
      end_(begin_ + (array.view().count() > 0 ? array.view().bytes() : 0)) {}

CallArray CallArray::or_in_place(const CallArray& output) const {
  CallArray input = *this;
  input.in_place_ = output.begin_;
  return input;
}

void expect_apart(std::initializer_list<CallArray> written, std::initializer_list<CallArray> read) {
  const auto refuse = [](const CallArray& output, const CallArray& other) {
    const std::string name = other.name_;
    throw ArgumentError(std::string(output.name_) + ": expected memory apart from " + name +
                        "'s, got an overlap. Pass an array of its own.");
  };
  for (const CallArray& output : written) {
    for (const CallArray& input : read) {
      const bool is_same = input.begin_ == output.begin_ && input.end_ == output.end_;
      if (output.overlaps(input) && !(is_same && input.in_place_ == output.begin_)) {
        refuse(output, input);
      }
    }
    for (const CallArray* other = written.begin(); other != &output; ++other) {
      if (output.overlaps(*other)) {
        refuse(output, *other);
      }
    }
  }
}

}  // namespace zsseg::bindings
