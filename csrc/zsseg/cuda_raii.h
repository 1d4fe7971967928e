// Scoped CUDA state. For sources that are built with CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "zsseg/cuda_check.h"

namespace zsseg {

// Whether something on this GPU has made a context in this process; asking makes none. True where
// the driver does not tell.
bool has_active_context(int device);

// Makes `device` current and restores the caller's on the way out. A caller's GPU that nothing was
// done with stays untouched: making it current would make a context there, some 0.5 GB. Then
// `device` stays current.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    ZSSEG_CUDA_CHECK(cudaGetDevice(&previous_));
    if (previous_ != device) {
      ZSSEG_CUDA_CHECK(cudaSetDevice(device));
      changed_ = true;
    }
  }
  ~DeviceGuard() {
    if (changed_ && has_active_context(previous_)) {
      static_cast<void>(cudaSetDevice(previous_));
    }
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

inline cudaStream_t to_stream(std::uintptr_t handle) {
  return reinterpret_cast<cudaStream_t>(handle);
}

}  // namespace zsseg
