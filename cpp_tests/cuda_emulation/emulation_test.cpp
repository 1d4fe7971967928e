// The emulated GPU runs right kernels rightly and shows what is wrong with wrong ones.
#include <algorithm>
#include <cmath>
#include <vector>

#include "device_test.h"
#include "zsseg/cuda_runtime.h"

namespace {

using zsseg::launch;

constexpr int kThreads = 64;

using CudaEmulation = cuda_emulation::DeviceTest;
using CudaEmulationDeathTest = CudaEmulation;
using cuda_emulation::device_array;
using cuda_emulation::fetch;
using cuda_emulation::new_stream;

std::string fault_of(void (*kernel)()) {
  launch("kernel", kernel, {1, kThreads}, nullptr);
  const cudaError_t status = cudaStreamSynchronize(nullptr);
  return status == cudaErrorLaunchFailure ? cudaGetErrorString(status) : "none";
}

__global__ void reverse_kernel(float* values, bool with_barrier) {
  __shared__ float block[kThreads];
  block[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (with_barrier) {
    __syncthreads();
  }
  values[threadIdx.x] = block[kThreads - 1 - threadIdx.x];
}

TEST_F(CudaEmulation, ABarrierMakesSharedMemoryAgree) {
  float* values = device_array<float>(kThreads);
  for (int round = 0; round < 8; ++round) {  // threads run in several orders
    launch("reverse_kernel", reverse_kernel, {1, kThreads}, nullptr, values, true);
    const std::vector<float> found = fetch(values, kThreads);
    for (int i = 0; i < kThreads; ++i) {
      EXPECT_EQ(found[i], kThreads - 1 - i);
    }
  }
}

TEST_F(CudaEmulation, AMissingBarrierShows) {
  float* values = device_array<float>(kThreads);
  launch("reverse_kernel", reverse_kernel, {1, kThreads}, nullptr, values, false);
  const std::vector<float> found = fetch(values, kThreads);
  EXPECT_EQ(std::count_if(found.begin(), found.end(), [](float v) { return std::isnan(v); }),
            kThreads / 2);  // whichever end came first
}

__global__ void last_block_kernel(unsigned* last, int* count) {
  *last = blockIdx.x + 10 * blockIdx.y;
  atomicAdd(count, 1);
}

TEST_F(CudaEmulation, BlocksRunInSeveralOrders) {
  unsigned* last = device_array<unsigned>(1);
  int* count = device_array<int>(1);
  std::vector<unsigned> found;
  for (int round = 0; round < 3; ++round) {
    const int zero = 0;
    ZSSEG_CUDA_CHECK(cudaMemcpyAsync(count, &zero, sizeof zero, cudaMemcpyHostToDevice, nullptr));
    launch("last_block_kernel", last_block_kernel, {dim3(5, 3), 1}, nullptr, last, count);
    found.push_back(fetch(last, 1)[0]);
    EXPECT_EQ(fetch(count, 1)[0], 15);
  }
  std::sort(found.begin(), found.end());
  EXPECT_EQ(std::unique(found.begin(), found.end()) - found.begin(), 3);
}

__global__ void diverging_kernel() {
  if (threadIdx.x < 3) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

TEST_F(CudaEmulation, DifferentBarriersAreAFault) {
  EXPECT_NE(fault_of(diverging_kernel).find("wait at different barriers: emulation_test.cpp:"),
            std::string::npos);
}

__global__ void sums_kernel(int* sums, unsigned* votes) {
  int sum = static_cast<int>(threadIdx.x);
  for (int step = 16; step > 0; step /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, step);
  }
  sums[threadIdx.x] = sum;
  votes[threadIdx.x] = __ballot_sync(0xffffffffu, threadIdx.x % 3 == 0);
}

TEST_F(CudaEmulation, LanesExchangeWithinTheirWarp) {
  int* sums = device_array<int>(kThreads);
  auto* votes = device_array<unsigned>(kThreads);
  launch("sums_kernel", sums_kernel, {1, kThreads}, nullptr, sums, votes);
  EXPECT_EQ(fetch(sums, kThreads)[5], 31 * 32 / 2);
  EXPECT_EQ(fetch(sums, kThreads)[37], 31 * 32 / 2 + 32 * 32);
  EXPECT_EQ(fetch(votes, kThreads)[0], 0x49249249u);
  EXPECT_EQ(fetch(votes, kThreads)[63], 0x92492492u);  // 33 is the first multiple there
}

__global__ void ended_lane_kernel() {
  if (threadIdx.x != 7) {
    __ballot_sync(0xffffffffu, true);
  }
}

TEST_F(CudaEmulation, WaitingForALaneThatEndedIsAFault) {
  EXPECT_NE(fault_of(ended_lane_kernel).find("waits for lane 7 of its warp"), std::string::npos);
}

__global__ void split_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else if (threadIdx.x % 2 == 0) {
    __ballot_sync(0xffffffffu, true);
  } else {
    __syncthreads();
  }
}

TEST_F(CudaEmulation, LanesThatNeverMeetAreAFault) {
  EXPECT_NE(fault_of(split_kernel).find("wait for ever at emulation_test.cpp:"), std::string::npos);
}

__global__ void nothing_kernel() {}

TEST_F(CudaEmulation, AfterAFaultEveryCallFails) {
  fault_of(diverging_kernel);
  void* pointer = nullptr;
  EXPECT_EQ(cudaMalloc(&pointer, 1), cudaErrorLaunchFailure);
  EXPECT_THROW(launch("nothing_kernel", nothing_kernel, {1, 1}, nullptr), zsseg::CudaError);
  cudaDeviceReset();
  EXPECT_EQ(cudaMalloc(&pointer, 1), cudaSuccess);
}

TEST_F(CudaEmulation, ImpossibleLaunchesAreRefused) {
  EXPECT_THROW(launch("nothing", nothing_kernel, {0, 1}, nullptr), zsseg::CudaError);
  EXPECT_THROW(launch("nothing", nothing_kernel, {1, 1025}, nullptr), zsseg::CudaError);
  EXPECT_THROW(launch("nothing", nothing_kernel, {dim3(1, 65536), 1}, nullptr), zsseg::CudaError);
  EXPECT_THROW(launch("nothing", nothing_kernel, {1, 1, 48 * 1024 + 1}, nullptr), zsseg::CudaError);
}

constexpr int kLargestShared = 48 * 1024 / sizeof(float);

template <int kValues>
__global__ void __launch_bounds__(kThreads, 2) static_kernel(float* values) {
  __shared__ float block[kValues];
  block[threadIdx.x] = 1.0f;
  __syncthreads();
  values[threadIdx.x] = block[kThreads - 1 - threadIdx.x];
}

template <typename T>
__global__ void unwritten_kernel(float* values) {
  __shared__ T block[kThreads];
  values[threadIdx.x] = static_cast<float>(block[threadIdx.x]);
  block[threadIdx.x] = T{};
}

TEST_F(CudaEmulation, SharedMemoryOfTemplatesIsPoisonedToo) {
  float* values = device_array<float>(kThreads);
  launch("unwritten", unwritten_kernel<float>, {2, kThreads}, nullptr, values);
  EXPECT_TRUE(std::isnan(fetch(values, kThreads)[5]));
}

TEST_F(CudaEmulation, StaticSharedMemoryHasALimit) {
  float* values = device_array<float>(kThreads);
  launch("static", static_kernel<kLargestShared>, {1, kThreads}, nullptr, values);
  EXPECT_EQ(fetch(values, kThreads)[3], 1.0f);
  EXPECT_THROW(launch("static", static_kernel<kLargestShared + 1>, {1, kThreads}, nullptr, values),
               zsseg::CudaError);
  EXPECT_THROW(launch("static", static_kernel<kLargestShared>, {1, kThreads, 4}, nullptr, values),
               zsseg::CudaError);
}

__global__ void dynamic_kernel(float* values, int index) {
  auto* shared = zsseg::dynamic_shared<float>();
  values[0] = shared[0];
  shared[index] = 1.0f;
}

TEST_F(CudaEmulation, DynamicSharedMemoryIsPoisonedAndWatched) {
  float* values = device_array<float>(1);
  launch("dynamic_kernel", dynamic_kernel, {1, 1, 4 * sizeof(float)}, nullptr, values, 3);
  EXPECT_TRUE(std::isnan(fetch(values, 1)[0]));
  launch("dynamic_kernel", dynamic_kernel, {1, 1, 4 * sizeof(float)}, nullptr, values, 4);
  ASSERT_EQ(cudaStreamSynchronize(nullptr), cudaErrorLaunchFailure);
  EXPECT_STREQ(cudaGetErrorString(cudaErrorLaunchFailure),
               "a block wrote past its 16 bytes of dynamic shared memory");
}

__global__ void write_kernel(float* values, std::int64_t index) {
  values[index] = 2.0f;
}

TEST_F(CudaEmulation, WhatNobodyWaitedForHasNotHappened) {
  const cudaStream_t first = new_stream(), second = new_stream();
  float* values = device_array<float>(1);
  launch("write_kernel", write_kernel, {1, 1}, first, values, std::int64_t{0});
  EXPECT_TRUE(std::isnan(fetch(values, 1, second)[0]));
  cudaEvent_t event = nullptr;
  ZSSEG_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  ZSSEG_CUDA_CHECK(cudaEventRecord(event, first));
  ZSSEG_CUDA_CHECK(cudaStreamWaitEvent(second, event, 0));
  EXPECT_EQ(fetch(values, 1, second)[0], 2.0f);
}

TEST_F(CudaEmulation, KernelsMayNotTakeHostPointers) {
  float value = 0.0f;
  EXPECT_THROW(launch("write_kernel", write_kernel, {1, 1}, nullptr, &value, std::int64_t{0}),
               zsseg::CudaError);
}

TEST_F(CudaEmulation, WritingJustOutsideIsFoundWhenFreed) {
  for (const std::int64_t index : {-1, 5}) {
    cudaDeviceReset();
    float* values = device_array<float>(5);
    launch("write_kernel", write_kernel, {1, 1}, nullptr, values, index);
    EXPECT_EQ(cudaFree(values), cudaErrorIllegalAddress);
  }
}

TEST_F(CudaEmulationDeathTest, WritingFurtherPastTheEndCrashes) {
  float* values = device_array<float>(5);
  launch("write_kernel", write_kernel, {1, 1}, nullptr, values, std::int64_t{64});
  EXPECT_DEATH(cudaStreamSynchronize(nullptr), "");
}

TEST_F(CudaEmulationDeathTest, TheHostCannotReadDeviceMemory) {
  const volatile float* values = device_array<float>(4);
  EXPECT_DEATH(static_cast<void>(values[0]), "");
}

TEST_F(CudaEmulationDeathTest, FreedMemoryIsGone) {
  const cudaStream_t stream = new_stream();
  float* values = device_array<float>(1);
  ZSSEG_CUDA_CHECK(cudaFreeAsync(values, stream));
  launch("write_kernel", write_kernel, {1, 1}, stream, values, std::int64_t{0});
  EXPECT_DEATH(cudaStreamSynchronize(stream), "");
}

int current_device() {
  int device = -1;
  ZSSEG_CUDA_CHECK(cudaGetDevice(&device));
  return device;
}

TEST_F(CudaEmulation, AGuardRestoresADeviceThatIsInUse) {
  cuda_emulation::set_device_count(2);
  ZSSEG_CUDA_CHECK(cudaSetDevice(0));
  {
    const zsseg::DeviceGuard guard(1);
    EXPECT_EQ(current_device(), 1);
  }
  EXPECT_EQ(current_device(), 0);
}

TEST_F(CudaEmulation, AGuardMakesNoContextWhereNoneWas) {
  cuda_emulation::set_device_count(2);
  {
    const zsseg::DeviceGuard guard(1);
  }
  EXPECT_FALSE(cuda_emulation::has_context(0));
  EXPECT_TRUE(cuda_emulation::has_context(1));
  EXPECT_EQ(current_device(), 1);
  EXPECT_EQ(zsseg::cuda::set_current_device(0, true), 1);  // likewise
  EXPECT_EQ(current_device(), 1);
  EXPECT_EQ(zsseg::cuda::set_current_device(0), 1);
  EXPECT_TRUE(cuda_emulation::has_context(0));
  EXPECT_EQ(current_device(), 0);
}

TEST_F(CudaEmulation, AFaultThatStaysAsksForARestart) {
  float* values = device_array<float>(1);
  ZSSEG_CUDA_CHECK(cudaFree(values));
  try {
    ZSSEG_CUDA_CHECK(cudaFree(values));
    FAIL();
  } catch (const zsseg::CudaError& error) {
    EXPECT_NE(std::string(error.what()).find("Restart the process"), std::string::npos);
  }
}

TEST_F(CudaEmulation, FreeingTwiceIsAFault) {
  float* values = device_array<float>(1);
  EXPECT_EQ(cudaFree(values), cudaSuccess);
  EXPECT_EQ(cudaFree(values), cudaErrorIllegalAddress);
}

}  // namespace
