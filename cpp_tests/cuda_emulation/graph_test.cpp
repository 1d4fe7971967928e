// The emulated GPU records and launches graphs, and refuses what CUDA refuses.
#include <cmath>
#include <functional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "device_test.h"

namespace {

using cuda_emulation::device_array;
using cuda_emulation::fetch;
using cuda_emulation::new_event;
using cuda_emulation::new_stream;
using zsseg::launch;

__global__ void add_kernel(float* to, const float* value) {
  *to += *value;
}

__global__ void double_kernel(float* value) {
  *value *= 2.0f;
}

__global__ void set_kernel(float* to, float value) {
  *to = value;
}

float* pinned_value(float value) {
  void* pointer = nullptr;
  ZSSEG_CUDA_CHECK(cudaHostAlloc(&pointer, sizeof value, cudaHostAllocMapped));
  *static_cast<float*>(pointer) = value;
  return static_cast<float*>(pointer);
}

class CudaGraphs : public cuda_emulation::DeviceTest {
 protected:
  void SetUp() override {
    DeviceTest::SetUp();
    stream = new_stream();
    value = device_array<float>(1);
    set(1.0f);
  }

  void set(float to) {
    launch("set_kernel", set_kernel, {1, 1}, stream, value, to);
    ZSSEG_CUDA_CHECK(cudaStreamSynchronize(stream));
  }
  float get() { return fetch(value, 1, stream)[0]; }

  void begin(cudaStreamCaptureMode mode = cudaStreamCaptureModeThreadLocal) {
    ASSERT_EQ(cudaStreamBeginCapture(stream, mode), cudaSuccess);
  }
  cudaError_t end() { return cudaStreamEndCapture(stream, &graph); }
  void instantiate() {
    ASSERT_EQ(end(), cudaSuccess);
    ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
    ASSERT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  }
  cudaStreamCaptureStatus status() {
    cudaStreamCaptureStatus found = cudaStreamCaptureStatusNone;
    EXPECT_EQ(cudaStreamIsCapturing(stream, &found), cudaSuccess);
    return found;
  }

  cudaStream_t stream = nullptr;
  float* value = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
};
using CudaGraphsDeathTest = CudaGraphs;

TEST_F(CudaGraphs, RecordedWorkRunsAtEachLaunchAndNotBefore) {
  float* host = pinned_value(0.0f);
  begin();
  launch("double_kernel", double_kernel, {1, 1}, stream, value);
  EXPECT_EQ(cudaMemcpyAsync(host, value, sizeof *host, cudaMemcpyDeviceToHost, stream),
            cudaSuccess);
  instantiate();
  EXPECT_EQ(get(), 1.0f);
  for (const float expected : {2.0f, 4.0f, 8.0f}) {
    const float before = *host;
    ASSERT_EQ(cudaGraphLaunch(exec, stream), cudaSuccess);
    EXPECT_EQ(*host, before);  // nobody waited
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    EXPECT_EQ(*host, expected);
  }
  set(-1.5f);
  ASSERT_EQ(cudaGraphLaunch(exec, stream), cudaSuccess);
  EXPECT_EQ(get(), -3.0f);
}

TEST_F(CudaGraphs, PinnedMemoryIsReadWhenALaunchGetsThere) {
  float* host = pinned_value(3.0f);
  begin();
  EXPECT_EQ(cudaMemcpyAsync(value, host, sizeof *host, cudaMemcpyHostToDevice, stream),
            cudaSuccess);
  instantiate();
  ASSERT_EQ(cudaGraphLaunch(exec, stream), cudaSuccess);
  *host = 4.0f;  // too early
  EXPECT_EQ(get(), 4.0f);
}

TEST_F(CudaGraphs, WhatIsNotAllowedEndsTheCapture) {
  const cudaEvent_t event = new_event(), outside = new_event();
  const cudaStream_t other = new_stream();
  ZSSEG_CUDA_CHECK(cudaEventRecord(outside, other));
  float pageable = 0.0f;
  void* made = nullptr;
  const std::vector<std::pair<cudaError_t, std::function<cudaError_t()>>> calls = {
      {cudaErrorStreamCaptureUnsupported, [&] { return cudaStreamSynchronize(stream); }},
      {cudaErrorStreamCaptureUnsupported, [&] { return cudaStreamQuery(stream); }},
      {cudaErrorStreamCaptureUnsupported, [&] { return cudaStreamSynchronize(other); }},
      {cudaErrorStreamCaptureUnsupported, [&] { return cudaEventQuery(outside); }},
      {cudaErrorCapturedEvent,
       [&] {
         EXPECT_EQ(cudaEventRecord(event, stream), cudaSuccess);
         return cudaEventSynchronize(event);
       }},
      {cudaErrorStreamCaptureUnsupported, [&] { return cudaMalloc(&made, 4); }},
      {cudaErrorStreamCaptureUnsupported, [&] { return cudaFree(nullptr); }},
      {cudaErrorStreamCaptureUnsupported, [&] { return cudaHostAlloc(&made, 4, 0); }},
      {cudaErrorStreamCaptureUnsupported,
       [&] { return cudaMemcpyAsync(value, &pageable, 4, cudaMemcpyHostToDevice, stream); }},
      {cudaErrorStreamCaptureUnsupported,
       [&] { return cudaMemcpyAsync(&pageable, value, 4, cudaMemcpyDeviceToHost, stream); }},
      {cudaErrorStreamCaptureIsolation, [&] { return cudaStreamWaitEvent(stream, outside, 0); }},
      {cudaErrorStreamCaptureImplicit, [&] { return cudaEventRecord(outside, nullptr); }},
      {cudaErrorInvalidValue, [&] { return cudaFreeAsync(value, stream); }},
  };
  for (std::size_t index = 0; index < calls.size(); ++index) {
    SCOPED_TRACE(index);
    begin();
    EXPECT_EQ(calls[index].second(), calls[index].first);
    EXPECT_EQ(status(), cudaStreamCaptureStatusInvalidated);
    EXPECT_THROW(launch("double_kernel", double_kernel, {1, 1}, stream, value),
                 zsseg::CaptureError);
    EXPECT_EQ(end(), cudaErrorStreamCaptureInvalidated);
    EXPECT_EQ(graph, nullptr);
    EXPECT_EQ(status(), cudaStreamCaptureStatusNone);
    EXPECT_EQ(get(), 1.0f);  // the stream works
  }
}

TEST_F(CudaGraphs, CapturesBeginAndEndWhereTheyMay) {
  EXPECT_EQ(end(), cudaErrorIllegalState);
  EXPECT_EQ(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeThreadLocal),
            cudaErrorStreamCaptureUnsupported);
  begin();
  EXPECT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal),
            cudaErrorIllegalState);
  cudaError_t elsewhere = cudaSuccess;
  std::thread([&] { elsewhere = end(); }).join();
  EXPECT_EQ(elsewhere, cudaErrorStreamCaptureWrongThread);
  EXPECT_EQ(end(), cudaErrorStreamCaptureInvalidated);
}

TEST_F(CudaGraphs, OtherThreadsMayAllocateDuringACapture) {
  begin();
  cudaError_t elsewhere = cudaErrorInvalidValue;
  std::thread([&] {
    void* made = nullptr;
    elsewhere = cudaMalloc(&made, 4);
  }).join();
  EXPECT_EQ(elsewhere, cudaSuccess);
  EXPECT_EQ(end(), cudaSuccess);
  begin(cudaStreamCaptureModeGlobal);
  std::thread([&] {
    void* made = nullptr;
    elsewhere = cudaMalloc(&made, 4);
  }).join();
  EXPECT_EQ(elsewhere, cudaErrorStreamCaptureUnsupported);
  EXPECT_EQ(end(), cudaErrorStreamCaptureInvalidated);
}

TEST_F(CudaGraphs, StreamsForkAndJoinWithinACapture) {
  const cudaStream_t branch = new_stream();
  const cudaEvent_t forked = new_event(), joined = new_event();
  float* other = device_array<float>(1);
  begin();
  launch("set_kernel", set_kernel, {1, 1}, stream, value, 1.0f);
  ZSSEG_CUDA_CHECK(cudaEventRecord(forked, stream));
  ZSSEG_CUDA_CHECK(cudaStreamWaitEvent(branch, forked, 0));
  launch("set_kernel", set_kernel, {1, 1}, branch, other, 5.0f);
  launch("double_kernel", double_kernel, {1, 1}, stream, value);
  ZSSEG_CUDA_CHECK(cudaEventRecord(joined, branch));
  ZSSEG_CUDA_CHECK(cudaStreamWaitEvent(stream, joined, 0));
  launch("add_kernel", add_kernel, {1, 1}, stream, value, other);
  instantiate();
  for (int round = 0; round < 4; ++round) {  // branches run in both orders
    ASSERT_EQ(cudaGraphLaunch(exec, stream), cudaSuccess);
    EXPECT_EQ(get(), 7.0f);
  }
  EXPECT_EQ(cudaStreamWaitEvent(stream, joined, 0), cudaErrorCapturedEvent);
  EXPECT_EQ(cudaStreamSynchronize(branch), cudaSuccess);
}

TEST_F(CudaGraphs, ADependencyThatIsMissingShows) {
  const cudaStream_t branch = new_stream();
  const cudaEvent_t forked = new_event(), joined = new_event();
  begin();
  ZSSEG_CUDA_CHECK(cudaEventRecord(forked, stream));
  ZSSEG_CUDA_CHECK(cudaStreamWaitEvent(branch, forked, 0));
  launch("set_kernel", set_kernel, {1, 1}, stream, value, 3.0f);
  launch("double_kernel", double_kernel, {1, 1}, branch, value);  // waits for nothing but the fork
  ZSSEG_CUDA_CHECK(cudaEventRecord(joined, branch));
  ZSSEG_CUDA_CHECK(cudaStreamWaitEvent(stream, joined, 0));
  instantiate();
  std::vector<float> found;
  for (int round = 0; round < 2; ++round) {
    ASSERT_EQ(cudaGraphLaunch(exec, stream), cudaSuccess);
    found.push_back(get());
  }
  EXPECT_EQ(found, (std::vector<float>{6.0f, 3.0f}));
}

TEST_F(CudaGraphs, ABranchMustBeJoined) {
  const cudaStream_t branch = new_stream();
  const cudaEvent_t forked = new_event();
  begin();
  ZSSEG_CUDA_CHECK(cudaEventRecord(forked, stream));
  ZSSEG_CUDA_CHECK(cudaStreamWaitEvent(branch, forked, 0));
  launch("double_kernel", double_kernel, {1, 1}, branch, value);
  cudaGraph_t none = nullptr;
  EXPECT_EQ(end(), cudaErrorStreamCaptureUnjoined);
  EXPECT_EQ(graph, nullptr);
  begin();
  ZSSEG_CUDA_CHECK(cudaEventRecord(forked, stream));
  ZSSEG_CUDA_CHECK(cudaStreamWaitEvent(branch, forked, 0));
  EXPECT_EQ(cudaStreamEndCapture(branch, &none), cudaErrorStreamCaptureUnmatched);
  EXPECT_EQ(end(), cudaErrorStreamCaptureInvalidated);
}

TEST_F(CudaGraphs, TwoCapturesDoNotMerge) {
  const cudaStream_t second = new_stream();
  const cudaEvent_t event = new_event();
  begin();
  ZSSEG_CUDA_CHECK(cudaStreamBeginCapture(second, cudaStreamCaptureModeThreadLocal));
  ZSSEG_CUDA_CHECK(cudaEventRecord(event, second));
  EXPECT_EQ(cudaStreamWaitEvent(stream, event, 0), cudaErrorStreamCaptureMerge);
  cudaGraph_t none = nullptr;
  EXPECT_EQ(cudaStreamEndCapture(second, &none), cudaErrorStreamCaptureInvalidated);
  EXPECT_EQ(end(), cudaErrorStreamCaptureInvalidated);
}

TEST_F(CudaGraphs, ExternalEventsAreReachedAtEachLaunch) {
  const cudaEvent_t first = new_event(), last = new_event();
  EXPECT_EQ(cudaEventRecordWithFlags(first, stream, cudaEventRecordExternal),
            cudaErrorInvalidValue);
  begin();
  ZSSEG_CUDA_CHECK(cudaEventRecordWithFlags(first, stream, cudaEventRecordExternal));
  launch("double_kernel", double_kernel, {1, 1}, stream, value);
  ZSSEG_CUDA_CHECK(cudaEventRecordWithFlags(last, stream, cudaEventRecordExternal));
  instantiate();
  float milliseconds = -1.0f;
  EXPECT_EQ(cudaEventElapsedTime(&milliseconds, first, last), cudaErrorInvalidResourceHandle);
  ASSERT_EQ(cudaGraphLaunch(exec, stream), cudaSuccess);
  EXPECT_EQ(cudaEventSynchronize(last), cudaSuccess);
  EXPECT_EQ(cudaEventElapsedTime(&milliseconds, first, last), cudaSuccess);
  EXPECT_GE(milliseconds, 0.0f);
}

TEST_F(CudaGraphs, LaunchesOfOneGraphRunOneAfterTheOther) {
  const cudaStream_t other = new_stream();
  begin();
  launch("double_kernel", double_kernel, {1, 1}, stream, value);
  instantiate();
  ASSERT_EQ(cudaGraphLaunch(exec, stream), cudaSuccess);
  ASSERT_EQ(cudaGraphLaunch(exec, other), cudaSuccess);
  EXPECT_EQ(fetch(value, 1, other)[0], 4.0f);
}

TEST_F(CudaGraphs, AGraphOwnsTheMemoryItAllocates) {
  void* made = nullptr;
  begin();
  ZSSEG_CUDA_CHECK(cudaMallocAsync(&made, sizeof(float), stream));
  auto* own = static_cast<float*>(made);
  launch("add_kernel", add_kernel, {1, 1}, stream, value, own);  // nobody wrote it: NaN
  launch("set_kernel", set_kernel, {1, 1}, stream, own, 1.0f);
  ZSSEG_CUDA_CHECK(cudaFreeAsync(made, stream));
  instantiate();
  for (int round = 0; round < 2; ++round) {
    set(0.0f);
    ASSERT_EQ(cudaGraphLaunch(exec, stream), cudaSuccess);
    EXPECT_TRUE(std::isnan(get()));
  }
  ASSERT_EQ(cudaGraphExecDestroy(exec), cudaSuccess);
  EXPECT_EQ(cudaFree(made), cudaErrorIllegalAddress);  // it has gone with the graph
}

TEST_F(CudaGraphs, LaunchesAreCountedWithWhatTheyHold) {
  const cuda_emulation::Counts before = cuda_emulation::counts();
  begin();
  launch("double_kernel", double_kernel, {1, 1}, stream, value);
  launch("double_kernel", double_kernel, {1, 1}, stream, value);
  instantiate();
  EXPECT_EQ(cuda_emulation::counts().launches, before.launches);
  ASSERT_EQ(cudaGraphLaunch(exec, stream), cudaSuccess);
  EXPECT_EQ(cuda_emulation::counts().launches, before.launches + 2);
  EXPECT_EQ(cuda_emulation::counts().graph_launches, before.graph_launches + 1);
}

TEST_F(CudaGraphs, TheGpuSeesPinnedMemoryAtAnAddressOfItsOwn) {
  float* host = pinned_value(2.0f);
  void* mapped = nullptr;
  ASSERT_EQ(cudaHostGetDevicePointer(&mapped, host, 0), cudaSuccess);
  EXPECT_THROW(launch("double_kernel", double_kernel, {1, 1}, stream, host), zsseg::CudaError);
  launch("double_kernel", double_kernel, {1, 1}, stream, static_cast<float*>(mapped));
  EXPECT_EQ(*host, 2.0f);
  ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  EXPECT_EQ(*host, 4.0f);
  EXPECT_EQ(cudaHostGetDevicePointer(&mapped, value, 0), cudaErrorInvalidValue);
  EXPECT_EQ(cudaFreeHost(host), cudaSuccess);
  EXPECT_EQ(cudaFreeHost(host), cudaErrorInvalidValue);
}

TEST_F(CudaGraphsDeathTest, FreedPinnedMemoryIsGone) {
  float* host = pinned_value(2.0f);
  ZSSEG_CUDA_CHECK(cudaMemcpyAsync(value, host, sizeof *host, cudaMemcpyHostToDevice, stream));
  ZSSEG_CUDA_CHECK(cudaFreeHost(host));
  EXPECT_DEATH(cudaStreamSynchronize(stream), "");
}

TEST_F(CudaGraphsDeathTest, AGraphDoesNotKeepWhatItWorksOn) {
  begin();
  launch("double_kernel", double_kernel, {1, 1}, stream, value);
  instantiate();
  ZSSEG_CUDA_CHECK(cudaFree(value));
  ZSSEG_CUDA_CHECK(cudaGraphLaunch(exec, stream));
  EXPECT_DEATH(cudaStreamSynchronize(stream), "");
}

TEST_F(CudaGraphs, TheLastErrorStaysUntilItIsAskedFor) {
  EXPECT_EQ(end(), cudaErrorIllegalState);
  EXPECT_EQ(get(), 1.0f);
  EXPECT_EQ(cudaGetLastError(), cudaErrorIllegalState);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
}

}  // namespace
