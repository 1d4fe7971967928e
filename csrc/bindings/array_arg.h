// From a Python object to a TensorView, without a copy: buffer protocol, then __dlpack__, then
// __cuda_array_interface__.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <memory>
#include <optional>

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
  // Of an argument that may be None; nothing then.
  static std::optional<ArrayArg> optional_input(pybind11::handle object, const char* name,
                                                StreamHandle stream) {
    return object.is_none() ? std::nullopt : std::optional(input(object, name, stream));
  }
  static std::optional<ArrayArg> optional_output(pybind11::handle object, const char* name,
                                                 StreamHandle stream) {
    return object.is_none() ? std::nullopt : std::optional(output(object, name, stream));
  }
  // Whose rows, along the first axis, may lie further apart than they are long.
  static ArrayArg pitched(pybind11::handle object, const char* name, StreamHandle stream) {
    return ArrayArg(object, name, stream, false, true);
  }

  const char* name() const { return name_; }
  const TensorView& view() const { return view_; }
  // From one row, along the first axis, to the next.
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

  const char* name_;
  TensorView view_;
  bool may_be_pitched_ = false;
  std::int64_t row_bytes_ = 0;
  std::shared_ptr<void> keeps_alive_;
};

// How operations take an argument that is absent: as null, or as a view of nothing.
inline const TensorView* view_or_null(const std::optional<ArrayArg>& argument) {
  return argument ? &argument->view() : nullptr;
}
inline TensorView view_or_none(const std::optional<ArrayArg>& argument) {
  return argument ? argument->view() : TensorView{};
}

// The `out` argument of an operation: the caller's array, or a new one where that is None.
class OutputArg {
 public:
  OutputArg(const pybind11::object& out, const char* name, const Shape& shape, DType dtype,
            const Device& device, StreamHandle stream);

  const char* name() const { return name_; }
  const TensorView& view() const { return view_; }
  const pybind11::object& result() const { return result_; }

 private:
  const char* name_;
  pybind11::object result_;
  TensorView view_;
  std::shared_ptr<ArrayArg> array_;
};

// The memory of one argument; none where an optional one is absent.
class CallArray {
 public:
  CallArray(const ArrayArg& array);   // NOLINT(google-explicit-constructor)
  CallArray(const OutputArg& array);  // NOLINT(google-explicit-constructor)
  template <typename Arg>
  CallArray(const std::optional<Arg>& arg) {  // NOLINT(google-explicit-constructor)
    if (arg) {
      *this = CallArray(*arg);
    }
  }

  // For an input that `output` may be, wholly: the operation reads each element before it writes
  // there.
  CallArray or_in_place(const CallArray& output) const;

 private:
  friend void expect_apart(std::initializer_list<CallArray> written,
                           std::initializer_list<CallArray> read);
  bool overlaps(const CallArray& other) const { return begin_ < other.end_ && other.begin_ < end_; }

  const char* name_ = "";
  std::uintptr_t begin_ = 0, end_ = 0;
  std::uintptr_t in_place_ = 0;  // where the output that this may be begins
};

// The one rule of all operations: throws ArgumentError where an array that is written shares memory
// with another argument, because what is read or was checked there changes under the operation.
void expect_apart(std::initializer_list<CallArray> written, std::initializer_list<CallArray> read);

}  // namespace zsseg::bindings
