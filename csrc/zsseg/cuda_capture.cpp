#include "zsseg/cuda_capture.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <iterator>
#include <mutex>
#include <utility>
#include <vector>

#include "zsseg/cuda_check.h"
#include "zsseg/cuda_raii.h"
#include "zsseg/error.h"

namespace zsseg::cuda {
namespace {

struct Deferred {
  StreamHandle stream;
  bool waits;
  std::function<void()> task;
};

struct Captures {
  std::mutex mutex;  // held while a capture begins, so that no free slips into one
  int active = 0;    // those begun here
  std::vector<Deferred> deferred;
  std::atomic<std::size_t> num_deferred{0};
};

// Never destroyed: arrays may go after static objects have.
Captures& captures() {
  static auto* const only = new Captures;
  return *only;
}

bool must_wait(const Captures& own, StreamHandle stream, bool waits) {
  return (waits && own.active > 0) || is_captured(stream);
}

cudaGraphExec_t to_graph(const Recording& recording) {
  return reinterpret_cast<cudaGraphExec_t>(recording.handle);
}

// Ends the capture on the stream; null where CUDA refused something in it.
cudaError_t end_on(StreamHandle stream, cudaGraph_t* graph) {
  const cudaError_t status = cudaStreamEndCapture(to_stream(stream), graph);
  if (status != cudaErrorStreamCaptureWrongThread && status != cudaErrorStreamCaptureUnmatched) {
    const std::lock_guard<std::mutex> lock(captures().mutex);
    --captures().active;
  }
  run_deferred();
  return status;
}

Recording instantiate(cudaGraph_t graph) {
  Recording made;
  ZSSEG_CUDA_CHECK(cudaGraphGetNodes(graph, nullptr, &made.nodes));
  cudaGraphExec_t ready = nullptr;
  ZSSEG_CUDA_CHECK(cudaGraphInstantiate(&ready, graph, 0));
  made.handle = reinterpret_cast<std::uintptr_t>(ready);
  return made;
}

}  // namespace

bool is_captured(StreamHandle stream) {
  cudaStreamCaptureStatus found = cudaStreamCaptureStatusNone;
  const cudaError_t status = cudaStreamIsCapturing(to_stream(stream), &found);
  if (status != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return status == cudaErrorStreamCaptureImplicit;
  }
  return found != cudaStreamCaptureStatusNone;
}

void begin_capture(StreamHandle stream, int device) {
  const DeviceGuard guard(device);
  const std::lock_guard<std::mutex> lock(captures().mutex);
  ZSSEG_CUDA_CHECK(cudaStreamBeginCapture(to_stream(stream), cudaStreamCaptureModeThreadLocal));
  ++captures().active;
}

Recording end_capture(StreamHandle stream, int device) {
  const DeviceGuard guard(device);
  cudaGraph_t graph = nullptr;
  ZSSEG_CUDA_CHECK(end_on(stream, &graph));
  try {
    const Recording made = instantiate(graph);
    static_cast<void>(cudaGraphDestroy(graph));
    return made;
  } catch (const CudaError&) {
    static_cast<void>(cudaGraphDestroy(graph));
    throw;
  }
}

void cancel_capture(StreamHandle stream, int device) noexcept {
  try {
    const DeviceGuard guard(device);
    cudaGraph_t graph = nullptr;
    static_cast<void>(end_on(stream, &graph));
    if (graph != nullptr) {
      static_cast<void>(cudaGraphDestroy(graph));
    }
    static_cast<void>(cudaGetLastError());
  } catch (const CudaError&) {
    return;  // the device is gone, and the capture with it
  }
}

void launch_recording(const Recording& recording, StreamHandle stream, int device) {
  const DeviceGuard guard(device);
  ZSSEG_CUDA_CHECK(cudaGraphLaunch(to_graph(recording), to_stream(stream)));
}

void destroy_recording(const Recording& recording, int device) noexcept {
  run_outside_captures(0, true, [recording, device] {
    const DeviceGuard guard(device);
    ZSSEG_CUDA_CHECK(cudaGraphExecDestroy(to_graph(recording)));
  });
}

void run_outside_captures(StreamHandle stream, bool waits, std::function<void()> task) noexcept {
  run_deferred();
  Captures& own = captures();
  const std::lock_guard<std::mutex> lock(own.mutex);
  if (must_wait(own, stream, waits)) {
    own.deferred.push_back({stream, waits, std::move(task)});
    own.num_deferred = own.deferred.size();
    return;
  }
  try {
    task();
  } catch (const CudaError&) {
    return;  // after the driver has shut down, everything is free
  }
}

void run_deferred() noexcept {
  Captures& own = captures();
  if (own.num_deferred == 0) {
    return;
  }
  std::vector<Deferred> ready;  // destroyed without the lock: a task may own what frees more
  const std::lock_guard<std::mutex> lock(own.mutex);
  const auto first = std::stable_partition(
      own.deferred.begin(), own.deferred.end(),
      [&own](const Deferred& item) { return must_wait(own, item.stream, item.waits); });
  std::move(first, own.deferred.end(), std::back_inserter(ready));
  own.deferred.erase(first, own.deferred.end());
  own.num_deferred = own.deferred.size();
  for (const Deferred& item : ready) {
    try {
      item.task();
    } catch (const CudaError&) {
      continue;
    }
  }
}

}  // namespace zsseg::cuda
