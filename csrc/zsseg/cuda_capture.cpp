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
#include "zsseg/cuda_runtime.h"
#include "zsseg/error.h"

namespace zsseg::cuda {
namespace {

struct Deferred {
  StreamHandle stream;
  int device;
  bool waits;
  std::function<void()> task;
};

struct Captures {
  // Held while a capture begins, so that no free and no event slips into one; tasks order streams.
  std::recursive_mutex mutex;
  int active = 0;  // those begun here
  std::vector<Deferred> deferred;
  std::atomic<std::size_t> num_deferred{0};
};

// Never destroyed: arrays may go after static objects have.
Captures& captures() {
  static auto* const only = new Captures;
  return *only;
}

bool must_wait(const Captures& own, const Deferred& item) {
  return (item.waits && own.active > 0) || is_captured(item.stream, item.device);
}

cudaGraphExec_t to_graph(const Recording& recording) {
  return reinterpret_cast<cudaGraphExec_t>(recording.handle);
}

// Ends the capture on the stream; null where CUDA refused something in it.
cudaError_t end_on(StreamHandle stream, cudaGraph_t* graph) {
  const cudaError_t status = cudaStreamEndCapture(to_stream(stream), graph);
  if (status != cudaErrorStreamCaptureWrongThread && status != cudaErrorStreamCaptureUnmatched) {
    const std::lock_guard<std::recursive_mutex> lock(captures().mutex);
    --captures().active;
  }
  run_deferred();
  return status;
}

Recording instantiate(cudaGraph_t graph) {
  Recording recording;
  ZSSEG_CUDA_CHECK(cudaGraphGetNodes(graph, nullptr, &recording.nodes));
  cudaGraphExec_t ready = nullptr;
  ZSSEG_CUDA_CHECK(cudaGraphInstantiate(&ready, graph, 0));
  recording.handle = reinterpret_cast<std::uintptr_t>(ready);
  return recording;
}

}  // namespace

bool is_captured(StreamHandle stream, int device) {
  const DeviceGuard guard(device);  // the call makes a context on whichever GPU is current
  cudaStreamCaptureStatus state = cudaStreamCaptureStatusNone;
  const cudaError_t status = cudaStreamIsCapturing(to_stream(stream), &state);
  if (status != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return status == cudaErrorStreamCaptureImplicit;
  }
  return state != cudaStreamCaptureStatusNone;
}

void begin_capture(StreamHandle stream, int device) {
  const DeviceGuard guard(device);
  const std::lock_guard<std::recursive_mutex> lock(captures().mutex);
  ZSSEG_CUDA_CHECK(cudaStreamBeginCapture(to_stream(stream), cudaStreamCaptureModeThreadLocal));
  ++captures().active;
}

Recording end_capture(StreamHandle stream, int device) {
  const DeviceGuard guard(device);
  cudaGraph_t graph = nullptr;
  ZSSEG_CUDA_CHECK(end_on(stream, &graph));
  try {
    const Recording recording = instantiate(graph);
    static_cast<void>(cudaGraphDestroy(graph));
    return recording;
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
  run_outside_captures(0, device, true, [recording, device] {
    const DeviceGuard guard(device);
    ZSSEG_CUDA_CHECK(cudaGraphExecDestroy(to_graph(recording)));
  });
}

void order_streams(StreamHandle earlier, StreamHandle later, int device) {
  if (earlier == later) {
    return;
  }
  const std::lock_guard<std::recursive_mutex> lock(captures().mutex);
  // Refused here, where nothing is spoiled: CUDA would end the capture, or draw the other stream
  // into it.
  if (is_captured(earlier, device) != is_captured(later, device)) {
    throw CaptureError(
        "array: expected one last used on the stream that is captured, or no capture of the stream "
        "that uses it, got a capture of one of the two. Wait for its stream first.");
  }
  const std::uintptr_t event = create_event(device, {});
  try {
    record_event(event, earlier, device);
    wait_event(later, event, device);
  } catch (const CudaError&) {
    destroy_event(event, device);
    throw;
  }
  destroy_event(event, device);  // CUDA frees it once it has been reached
}

void run_outside_captures(StreamHandle stream, int device, bool waits,
                          std::function<void()> task) noexcept {
  run_deferred();
  Captures& own = captures();
  const std::lock_guard<std::recursive_mutex> lock(own.mutex);
  try {
    Deferred item{stream, device, waits, std::move(task)};
    if (must_wait(own, item)) {
      own.deferred.push_back(std::move(item));
      own.num_deferred = own.deferred.size();
      return;
    }
    item.task();
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
  const std::lock_guard<std::recursive_mutex> lock(own.mutex);
  const auto first =
      std::stable_partition(own.deferred.begin(), own.deferred.end(),
                            [&own](const Deferred& item) { return must_wait(own, item); });
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
