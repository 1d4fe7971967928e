// From a Python object to a TensorView, without a copy: buffer protocol, then __dlpack__, then
// __cuda_array_interface__.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

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

  const TensorView& view() const { return view_; }

 private:
  ArrayArg(pybind11::handle object, const char* name, StreamHandle stream, bool writable);
  bool take_device_array(pybind11::handle object, StreamHandle stream);
  bool take_buffer(pybind11::handle object, const char* name, bool writable);
  bool take_dlpack(pybind11::handle object, const char* name, StreamHandle stream, bool writable);
  bool take_cuda_array_interface(pybind11::handle object, const char* name, StreamHandle stream,
                                 bool writable);

  TensorView view_;
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
