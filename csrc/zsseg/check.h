// Argument checks with uniform wording; every <op>.cpp is written in these.
#pragma once

#include <initializer_list>
#include <string>

#include "zsseg/tensor_view.h"

namespace zsseg {

constexpr std::int64_t kAnySize = -1;

std::string to_string(const Shape& shape);    // "(3, 4)", kAnySize as "*"
std::string to_string(const Device& device);  // "cpu", "cuda:0"

// Throws ShapeError unless `view` has the rank and sizes of `pattern`.
void expect_shape(const char* name, const TensorView& view, const Shape& pattern);

// Throws DTypeError unless the element type is among `allowed`.
void expect_dtype(const char* name, const TensorView& view, std::initializer_list<DType> allowed);

// Throws DeviceError unless `view` is where `other` is.
void expect_same_device(const char* name, const TensorView& view, const char* other_name,
                        const TensorView& other);

// Throws ArgumentError "name: expected <expected>, got <got>."
[[noreturn]] void fail_argument(const char* name, const std::string& expected,
                                const std::string& got);

// As printf's %g, which is Python's format(value, "g").
std::string to_text(double value);

}  // namespace zsseg
