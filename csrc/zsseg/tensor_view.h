// The one description of an array that kernels, checks and bindings share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace zsseg {

// Names are NumPy's. `other` is anything no kernel takes; it exists so that errors can be worded.
enum class DType : std::uint8_t {
  boolean,
  uint8,
  int8,
  uint16,
  int16,
  int32,
  int64,
  float16,
  bfloat16,
  float32,
  float64,
  other,
};

std::size_t size_of(DType dtype);  // bytes an element; 0 for `other`
const char* name_of(DType dtype);  // "float32", ...

enum class DeviceKind : std::uint8_t { cpu, cuda };

struct Device {
  DeviceKind kind = DeviceKind::cpu;
  int index = 0;

  bool is_cuda() const { return kind == DeviceKind::cuda; }
  friend bool operator==(const Device& a, const Device& b) {
    return a.kind == b.kind && a.index == b.index;
  }
  friend bool operator!=(const Device& a, const Device& b) { return !(a == b); }
};

// Up to kMaxRank sizes, held in place: making a view never allocates.
struct Shape {
  static constexpr int kMaxRank = 4;

  std::int64_t dims[kMaxRank] = {0, 0, 0, 0};
  int rank = 0;

  Shape() = default;
  Shape(std::initializer_list<std::int64_t> sizes) {
    for (const std::int64_t size : sizes) {
      if (rank < kMaxRank) {
        dims[rank++] = size;
      }
    }
  }

  std::int64_t operator[](int axis) const { return dims[axis]; }

  std::int64_t count() const {
    std::int64_t product = 1;
    for (int axis = 0; axis < rank; ++axis) {
      product *= dims[axis];
    }
    return product;
  }

  friend bool operator==(const Shape& a, const Shape& b) {
    if (a.rank != b.rank) {
      return false;
    }
    for (int axis = 0; axis < a.rank; ++axis) {
      if (a.dims[axis] != b.dims[axis]) {
        return false;
      }
    }
    return true;
  }
  friend bool operator!=(const Shape& a, const Shape& b) { return !(a == b); }
};

// A borrowed, contiguous, row-major array. Owns nothing: whoever made it keeps the memory alive.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::other;
  Shape shape;
  Device device;

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
  std::int64_t count() const { return shape.count(); }
  std::size_t bytes() const { return static_cast<std::size_t>(count()) * size_of(dtype); }
};

// A cudaStream_t as a number; 0 is the legacy default stream. Ignored on the CPU.
using StreamHandle = std::uintptr_t;

}  // namespace zsseg
