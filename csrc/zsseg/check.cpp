#include "zsseg/check.h"

#include <cstdio>

#include "zsseg/error.h"

namespace zsseg {

std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::boolean:
    case DType::uint8:
    case DType::int8:
      return 1;
    case DType::uint16:
    case DType::int16:
    case DType::float16:
    case DType::bfloat16:
      return 2;
    case DType::int32:
    case DType::float32:
      return 4;
    case DType::int64:
    case DType::float64:
      return 8;
    case DType::other:
      break;
  }
  return 0;
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::boolean:
      return "bool";
    case DType::uint8:
      return "uint8";
    case DType::int8:
      return "int8";
    case DType::uint16:
      return "uint16";
    case DType::int16:
      return "int16";
    case DType::int32:
      return "int32";
    case DType::int64:
      return "int64";
    case DType::float16:
      return "float16";
    case DType::bfloat16:
      return "bfloat16";
    case DType::float32:
      return "float32";
    case DType::float64:
      return "float64";
    case DType::other:
      break;
  }
  return "another type";
}

std::string to_string(const Shape& shape) {
  std::string text = "(";
  for (int axis = 0; axis < shape.rank; ++axis) {
    text += axis > 0 ? ", " : "";
    text += shape[axis] == kAnySize ? "*" : std::to_string(shape[axis]);
  }
  return text + (shape.rank == 1 ? ",)" : ")");
}

std::string to_string(const Device& device) {
  return device.is_cuda() ? "cuda:" + std::to_string(device.index) : "cpu";
}

void expect_shape(const char* name, const TensorView& view, const Shape& pattern) {
  bool fits = view.shape.rank == pattern.rank;
  for (int axis = 0; fits && axis < pattern.rank; ++axis) {
    fits = pattern[axis] == kAnySize || pattern[axis] == view.shape[axis];
  }
  if (!fits) {
    throw ShapeError(std::string(name) + ": expected shape " + to_string(pattern) + ", got " +
                     to_string(view.shape) + ". Check its sizes and the order of its axes.");
  }
}

void expect_dtype(const char* name, const TensorView& view, std::initializer_list<DType> allowed) {
  std::string names;
  for (const DType dtype : allowed) {
    if (view.dtype == dtype) {
      return;
    }
    names += (names.empty() ? "" : " or ") + std::string(name_of(dtype));
  }
  throw DTypeError(std::string(name) + ": expected " + names + ", got " + name_of(view.dtype) +
                   ". Convert it first.");
}

void expect_same_device(const char* name, const TensorView& view, const char* other_name,
                        const TensorView& other) {
  if (view.device != other.device) {
    throw DeviceError(std::string(name) + ": expected to be on " + to_string(other.device) +
                      " like " + other_name + ", got " + to_string(view.device) +
                      ". Put all arrays on one device.");
  }
}

void fail_argument(const char* name, const std::string& expected, const std::string& got) {
  throw ArgumentError(std::string(name) + ": expected " + expected + ", got " + got +
                      ". Pass a value in that range.");
}

std::string to_text(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

}  // namespace zsseg
