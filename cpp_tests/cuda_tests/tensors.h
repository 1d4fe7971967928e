// Arrays for the program that launches every kernel: the same content on the host and on the GPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "zsseg/cuda_runtime.h"
#include "zsseg/half.h"
#include "zsseg/tensor_view.h"

namespace zsseg::cuda_tests {

// An array in host memory, aligned as the CPU kernels ask of a workspace.
class HostTensor {
 public:
  HostTensor(DType dtype, const Shape& shape)
      : dtype_(dtype),
        shape_(shape),
        blocks_((static_cast<std::size_t>(shape.count()) * size_of(dtype) + 63) / 64 + 1) {}

  TensorView view() const { return {const_cast<Block*>(blocks_.data()), dtype_, shape_, Device{}}; }
  std::size_t bytes() const { return view().bytes(); }
  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(blocks_.data());
  }
  template <typename T>
  const T* as() const {
    return reinterpret_cast<const T*>(blocks_.data());
  }

  // Element `index` as a number, whatever the dtype.
  double at(std::int64_t index) const {
    switch (dtype_) {
      case DType::uint8:
        return as<std::uint8_t>()[index];
      case DType::uint16:
        return as<std::uint16_t>()[index];
      case DType::int32:
        return as<std::int32_t>()[index];
      case DType::int64:
        return static_cast<double>(as<std::int64_t>()[index]);
      case DType::float16:
        return half_to_float(as<Half>()[index]);
      case DType::bfloat16:
        return bfloat16_to_float(as<Bfloat16>()[index]);
      default:
        return as<float>()[index];
    }
  }

 private:
  struct alignas(64) Block {
    unsigned char bytes[64];
  };
  DType dtype_;
  Shape shape_;
  std::vector<Block> blocks_;
};

// Random content, the same in every run: normal deviates, or whole numbers below `limit`.
class Randomness {
 public:
  HostTensor normal(DType dtype, const Shape& shape) {
    HostTensor made(dtype, shape);
    std::normal_distribution<float> deviates;
    for (std::int64_t i = 0; i < shape.count(); ++i) {
      const float value = deviates(engine_);
      if (dtype == DType::float16) {
        made.as<Half>()[i] = float_to_half(value);
      } else if (dtype == DType::bfloat16) {
        made.as<Bfloat16>()[i] = float_to_bfloat16(value);
      } else {
        made.as<float>()[i] = value;
      }
    }
    return made;
  }

  HostTensor whole(DType dtype, const Shape& shape, int limit) {
    HostTensor made(dtype, shape);
    for (std::int64_t i = 0; i < shape.count(); ++i) {
      const auto value = static_cast<int>(engine_() % static_cast<unsigned>(limit));
      if (size_of(dtype) == 1) {
        made.as<std::uint8_t>()[i] = static_cast<std::uint8_t>(value);
      } else if (size_of(dtype) == 2) {
        made.as<std::uint16_t>()[i] = static_cast<std::uint16_t>(value);
      } else {
        made.as<std::int32_t>()[i] = value;
      }
    }
    return made;
  }

 private:
  std::mt19937 engine_{20261122};
};

// An array on the GPU that begins one element past an aligned address, or there, with bytes on both
// sides that no kernel may touch. A result starts as NaN, or untouched where a tool watches for
// reads of memory that nothing wrote.
class GpuTensor {
 public:
  static GpuTensor input(const HostTensor& content, bool aligned, StreamHandle stream) {
    GpuTensor made(content.view().dtype, content.view().shape, false,
                   aligned ? 0 : size_of(content.view().dtype), stream);
    const std::vector<unsigned char> poison(made.capacity(), kPoison);
    cuda::copy_to_device(made.base_, poison.data(), poison.size(), 0, stream);
    cuda::copy_to_device(made.data(), content.as<char>(), content.bytes(), 0, stream);
    cuda::synchronize_stream(stream, 0);
    return made;
  }
  static GpuTensor result(DType dtype, const Shape& shape, bool poisoned, bool aligned,
                          StreamHandle stream) {
    return GpuTensor(dtype, shape, poisoned, aligned ? 0 : size_of(dtype), stream);
  }
  // Kernels may ask for 64 bytes of alignment of it.
  static GpuTensor workspace(std::size_t bytes, bool poisoned, StreamHandle stream) {
    return GpuTensor(DType::uint8, {static_cast<std::int64_t>(bytes)}, poisoned, 0, stream);
  }

  GpuTensor(GpuTensor&& other) noexcept
      : view_(other.view_),
        base_(std::exchange(other.base_, nullptr)),
        offset_(other.offset_),
        poisoned_(other.poisoned_),
        stream_(other.stream_) {}
  GpuTensor(const GpuTensor&) = delete;
  GpuTensor& operator=(const GpuTensor&) = delete;
  GpuTensor& operator=(GpuTensor&&) = delete;
  ~GpuTensor() {
    if (base_ != nullptr) {
      cuda::release(base_, 0, stream_);
    }
  }

  const TensorView& view() const { return view_; }
  char* data() const { return static_cast<char*>(view_.data); }

  HostTensor fetch() const {
    HostTensor fetched(view_.dtype, view_.shape);
    cuda::copy_to_host(fetched.as<char>(), data(), view_.bytes(), 0, stream_);
    cuda::synchronize_stream(stream_, 0);
    return fetched;
  }

  // Whether a kernel wrote outside the array; unknown, so false, where it was left untouched.
  bool was_written_around() const {
    if (!poisoned_) {
      return false;
    }
    std::vector<unsigned char> all(capacity());
    cuda::copy_to_host(all.data(), base_, all.size(), 0, stream_);
    cuda::synchronize_stream(stream_, 0);
    for (std::size_t i = 0; i < all.size(); ++i) {
      const bool inside = i >= kAround + offset_ && i < kAround + offset_ + view_.bytes();
      if (!inside && all[i] != kGuard) {
        return true;
      }
    }
    return false;
  }

 private:
  static constexpr std::size_t kAround = 256;
  static constexpr unsigned char kPoison = 0xFF;  // NaN as float
  // Around what kernels write; other than what they would copy here from beyond their inputs' end.
  static constexpr unsigned char kGuard = 0xA5;

  GpuTensor(DType dtype, const Shape& shape, bool poisoned, std::size_t offset, StreamHandle stream)
      : view_{nullptr, dtype, shape, Device{DeviceKind::cuda, 0}},
        offset_(offset),
        poisoned_(poisoned),
        stream_(stream) {
    base_ = static_cast<char*>(cuda::allocate(capacity(), 0, stream));
    view_.data = base_ + kAround + offset;
    if (poisoned) {
      std::vector<unsigned char> poison(capacity(), kGuard);
      std::fill_n(poison.begin() + kAround + offset, view_.bytes(), kPoison);
      cuda::copy_to_device(base_, poison.data(), poison.size(), 0, stream);
      cuda::synchronize_stream(stream, 0);
    }
  }

  std::size_t capacity() const { return view_.bytes() + offset_ + 2 * kAround; }

  TensorView view_;
  char* base_ = nullptr;
  std::size_t offset_;
  bool poisoned_;
  StreamHandle stream_;
};

}  // namespace zsseg::cuda_tests
