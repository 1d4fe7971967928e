// From a Python object to a TensorView, without a copy: buffer protocol, then __dlpack__, then
// __cuda_array_interface__.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "bindings/dlpack_abi.h"
#include "zsseg/tensor_view.h"

namespace zsseg::bindings {

// Borrows the memory of one argument for as long as it lives. Make and destroy it under the GIL.
// Throws DTypeError for what is no array, ShapeError for what is not C-contiguous, does not lie at
// a multiple of its elements' size, has more than Shape::kMaxRank axes or, where `writable` is
// asked, is read-only.
class ArrayArg {
 public:
  static ArrayArg input(pybind11::handle object, const char* name, StreamHandle stream) {
    return ArrayArg(object, name, stream, false);
  }
  static ArrayArg output(pybind11::handle object, const char* name, StreamHandle stream) {
    return ArrayArg(object, name, stream, true);
  }
  // Whose rows, along the first axis, may lie further apart than they are long.
  static ArrayArg pitched(pybind11::handle object, const char* name, StreamHandle stream) {
    return ArrayArg(object, name, stream, false, true);
  }

  const TensorView& view() const { return view_; }
  // From one row to the next, where `pitched` was asked.
  std::int64_t row_bytes() const { return row_bytes_; }

 private:
  ArrayArg(pybind11::handle object, const char* name, StreamHandle stream, bool writable,
           bool may_be_pitched = false);
  // `strides` are in units of `unit` bytes, or null for none.
  void take_strides(const char* name, const std::int64_t* strides, std::int64_t unit,
                    std::int64_t item_bytes);
  bool take_device_array(pybind11::handle object, const char* name, StreamHandle stream);
  bool take_buffer(pybind11::handle object, const char* name, bool writable);
  bool take_dlpack(pybind11::handle object, const char* name, StreamHandle stream, bool writable);
  void take_dlpack_tensor(const char* name, const dlpack::Tensor& tensor);
  bool take_cuda_array_interface(pybind11::handle object, const char* name, StreamHandle stream,
                                 bool writable);

  TensorView view_;
  bool may_be_pitched_ = false;
  std::int64_t row_bytes_ = 0;
  std::shared_ptr<void> keeps_alive_;
};

// The `out` argument of an operation: the caller's array, or a new one where that is None.
class OutputArg {
 public:
  OutputArg(const pybind11::object& given, const char* name, const Shape& shape, DType dtype,
            const Device& device, StreamHandle stream);

  const TensorView& view() const { return view_; }
  const pybind11::object& result() const { return result_; }

 private:
  pybind11::object result_;
  TensorView view_;
  std::shared_ptr<ArrayArg> given_;
};

}  // namespace zsseg::bindings
