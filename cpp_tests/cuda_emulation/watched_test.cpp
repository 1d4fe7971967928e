// Compiled as the kernels are where each access to memory is watched: what that finds.
#include <string>

#include "device_test.h"

namespace {

using cuda_emulation::device_array;
using cuda_emulation::fetch;
using zsseg::launch;

constexpr int kThreads = 64;

class CudaWatched : public cuda_emulation::DeviceTest {
 protected:
  template <typename... Parameters>
  std::string fault_of(void (*kernel)(float*, Parameters...), Parameters... parameters) {
    float* values = device_array<float>(kThreads);
    launch("kernel", kernel, {1, kThreads, kThreads * sizeof(float)}, nullptr, values,
           parameters...);
    return cudaStreamSynchronize(nullptr) == cudaErrorLaunchFailure
               ? cudaGetErrorString(cudaErrorLaunchFailure)
               : "none";
  }
};
using CudaWatchedDeathTest = CudaWatched;

constexpr int kLine = __LINE__ + 1;  // of the kernel
__global__ void reverse_kernel(float* values, int barriers) {
  __shared__ float block[kThreads];
  if (barriers > 1) {
    block[threadIdx.x] = 0.0f;
    __syncthreads();
  }
  block[threadIdx.x] = 1.0f;
  if (barriers > 0) {
    __syncthreads();
  }
  values[threadIdx.x] = block[kThreads - 1 - threadIdx.x];
}

TEST_F(CudaWatched, AMissingBarrierIsNamedByItsLines) {
  EXPECT_EQ(fault_of(reverse_kernel, 1), "none");
  EXPECT_EQ(fault_of(reverse_kernel, 2), "none");
  const std::string fault = fault_of(reverse_kernel, 0);
  EXPECT_NE(fault.find("shared memory is "), std::string::npos) << fault;
  EXPECT_NE(fault.find("watched_test.cpp:" + std::to_string(kLine + 6) + " "), std::string::npos)
      << fault;
  EXPECT_NE(fault.find("watched_test.cpp:" + std::to_string(kLine + 10) + " "), std::string::npos)
      << fault;
  EXPECT_NE(fault.find("with no barrier between"), std::string::npos) << fault;
}

template <typename T>
__global__ void template_kernel(float* values) {
  __shared__ T block[kThreads];
  block[threadIdx.x] = T{1};
  values[threadIdx.x] = static_cast<float>(block[kThreads - 1 - threadIdx.x]);
}

TEST_F(CudaWatched, SharedMemoryOfTemplatesIsWatchedToo) {
  EXPECT_NE(fault_of(template_kernel<double>).find("no barrier between"), std::string::npos);
}

// Right by chance in any order: every thread writes the same.
__global__ void same_value_kernel(float* values) {
  auto* shared = zsseg::dynamic_shared<float>();
  shared[0] = 1.0f;
  __syncthreads();
  values[threadIdx.x] = shared[0];
}

TEST_F(CudaWatched, DynamicSharedMemoryIsWatchedToo) {
  EXPECT_NE(fault_of(same_value_kernel).find("written by another thread"), std::string::npos);
}

__global__ void overwrite_kernel(float* values) {
  __shared__ float block[kThreads];
  block[threadIdx.x] = values[threadIdx.x];
  __syncthreads();
  values[threadIdx.x] = block[threadIdx.x ^ 1];
  block[threadIdx.x] = 0.0f;  // its neighbour may not have read yet
}

TEST_F(CudaWatched, WritingWhatAnotherThreadStillReadsIsFound) {
  EXPECT_NE(fault_of(overwrite_kernel).find("no barrier between"), std::string::npos);
}

__global__ void lanes_kernel(float* values, bool meet, int step) {
  __shared__ float block[kThreads];
  block[threadIdx.x] = 1.0f;
  if (meet) {
    __ballot_sync(0xffffffffu, true);
  }
  values[threadIdx.x] = block[threadIdx.x ^ static_cast<unsigned>(step)];
}

TEST_F(CudaWatched, LanesThatMeetAreInOrderAndWarpsAreNot) {
  EXPECT_EQ(fault_of(lanes_kernel, true, 1), "none");
  EXPECT_NE(fault_of(lanes_kernel, false, 1).find("no barrier between"), std::string::npos);
  cudaDeviceReset();
  EXPECT_NE(fault_of(lanes_kernel, true, 32).find("no barrier between"), std::string::npos);
}

__global__ void atomics_kernel(float* values, bool with_barrier) {
  __shared__ int count;
  if (threadIdx.x == 0) {
    count = 0;
  }
  if (with_barrier) {
    __syncthreads();
  }
  atomicAdd(&count, 1);
  __syncthreads();
  values[threadIdx.x] = static_cast<float>(count);
}

TEST_F(CudaWatched, AtomicsAgreeWithEachOtherAlone) {
  EXPECT_EQ(fault_of(atomics_kernel, true), "none");
  EXPECT_NE(fault_of(atomics_kernel, false).find("changed by an atomic"), std::string::npos);
}

struct alignas(16) Four {
  float values[4];
};

__global__ void vector_kernel(float* values, int offset) {
  const Four four = *reinterpret_cast<const Four*>(values + offset);
  values[threadIdx.x] = four.values[3];
}

TEST_F(CudaWatchedDeathTest, AMisalignedVectorLoadIsNamed) {
  EXPECT_EQ(fault_of(vector_kernel, 4), "none");
  EXPECT_DEATH(fault_of(vector_kernel, 5), "watched_test.cpp:.*misaligned address");
}

__global__ void overflow_kernel(float* values, int large) {
  values[threadIdx.x] = static_cast<float>(large + static_cast<int>(threadIdx.x));
}

TEST_F(CudaWatchedDeathTest, AnOverflowIsNamed) {
  EXPECT_EQ(fault_of(overflow_kernel, 0x7fffff00), "none");
  EXPECT_DEATH(fault_of(overflow_kernel, 0x7ffffff0), "watched_test.cpp:.*signed integer overflow");
}

}  // namespace
