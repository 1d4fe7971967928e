// What the tests of the emulated GPU share.
#pragma once

#include <gtest/gtest.h>

#include <vector>

#include "zsseg/cuda_launch.h"
#include "zsseg/cuda_raii.h"

namespace cuda_emulation {

// Each test has a device that nothing was done with.
class DeviceTest : public testing::Test {
 protected:
  void SetUp() override { cudaDeviceReset(); }
  void TearDown() override { cudaDeviceReset(); }
};

template <typename T>
T* device_array(std::size_t count) {
  void* pointer = nullptr;
  ZSSEG_CUDA_CHECK(cudaMalloc(&pointer, count * sizeof(T)));
  return static_cast<T*>(pointer);
}

template <typename T>
std::vector<T> fetch(const T* from, std::size_t count, cudaStream_t stream = nullptr) {
  std::vector<T> host(count);
  ZSSEG_CUDA_CHECK(
      cudaMemcpyAsync(host.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost, stream));
  return host;
}

inline cudaStream_t new_stream() {
  cudaStream_t stream = nullptr;
  ZSSEG_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return stream;
}

inline cudaEvent_t new_event() {
  cudaEvent_t event = nullptr;
  ZSSEG_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDefault));
  return event;
}

}  // namespace cuda_emulation
