// Streams that wait, and events.
#include "runtime.h"

namespace cuda_emulation {
namespace {

// Makes a stream part of the capture an event was recorded in, or orders it within.
cudaError_t join(const std::shared_ptr<Stream>& stream, const Event& event) {
  Capture& capture = *event.capture;
  if (!capture.is_active) {
    return stream->capture == nullptr ? report(cudaErrorCapturedEvent)
                                      : refuse(*stream->capture, cudaErrorCapturedEvent);
  }
  if (stream == runtime().default_stream) {
    return refuse(capture, cudaErrorStreamCaptureImplicit);
  }
  if (stream->capture != nullptr && stream->capture != event.capture) {
    refuse(*stream->capture, cudaErrorStreamCaptureMerge);
    return refuse(capture, cudaErrorStreamCaptureMerge);
  }
  if (!capture.is_valid) {
    return report(cudaErrorStreamCaptureInvalidated);
  }
  stream->capture = event.capture;
  stream->known.insert(event.known.begin(), event.known.end());
  return report(cudaSuccess);
}

cudaError_t mark_in_capture(Event& event, const Stream& stream) {
  if (!stream.capture->is_valid) {
    return report(cudaErrorStreamCaptureInvalidated);
  }
  event.stream = nullptr;
  event.capture = stream.capture;
  event.known = stream.known;
  return report(cudaSuccess);
}

cudaError_t mark(Event& event, const std::shared_ptr<Stream>& stream) {
  auto reached = std::make_shared<Clock::time_point>();
  const cudaError_t status =
      enqueue(*stream, [reached] { *reached = Clock::now(); }, &Counts::events_recorded);
  if (status == cudaSuccess) {
    event.stream = stream;
    event.ticket = stream->enqueued;
    event.reached = reached;
    event.capture = nullptr;
  }
  return status;
}

bool is_reached(const Event& event) {
  return event.stream != nullptr && event.stream->done >= event.ticket;
}

// What may not be done with the event, from the calling thread.
cudaError_t refuse_wait(const Event& event) {
  if (event.capture != nullptr) {
    return event.capture->is_active ? refuse(*event.capture, cudaErrorCapturedEvent)
                                    : report(cudaErrorCapturedEvent);
  }
  return refuse_unsafe_call();
}

}  // namespace
}  // namespace cuda_emulation

using namespace cuda_emulation;

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  const Lock lock(runtime().mutex);
  const std::shared_ptr<Stream> stream = find(handle);
  const auto found = runtime().events.find(event);
  if (stream == nullptr || found == runtime().events.end()) {
    return report(cudaErrorInvalidResourceHandle);
  }
  if (found->second.capture != nullptr) {
    return join(stream, found->second);
  }
  if (found->second.stream == nullptr) {
    return report(cudaSuccess);
  }
  if (stream->capture != nullptr) {
    return refuse(*stream->capture, cudaErrorStreamCaptureIsolation);
  }
  return enqueue(
      *stream,
      [earlier = found->second.stream, ticket = found->second.ticket] {
        run_until(*earlier, ticket);
      },
      &Counts::stream_waits);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  const Lock lock(runtime().mutex);
  *event = new_handle<cudaEvent_t>();
  runtime().events[*event].timing = (flags & cudaEventDisableTiming) == 0;
  ++runtime().counts.events_made;
  return report(cudaSuccess);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  const Lock lock(runtime().mutex);
  return report(runtime().events.erase(event) == 1 ? cudaSuccess : cudaErrorInvalidResourceHandle);
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, cudaEventRecordDefault);
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t handle, unsigned flags) {
  const Lock lock(runtime().mutex);
  const std::shared_ptr<Stream> stream = find(handle);
  const auto found = runtime().events.find(event);
  if (stream == nullptr || found == runtime().events.end()) {
    return report(cudaErrorInvalidResourceHandle);
  }
  if (flags == cudaEventRecordExternal) {
    return stream->capture == nullptr
               ? report(cudaErrorInvalidValue)
               : record(*stream, {nullptr, event, &Counts::events_recorded, {}});
  }
  return stream->capture != nullptr ? mark_in_capture(found->second, *stream)
                                    : mark(found->second, stream);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const Lock lock(runtime().mutex);
  const auto found = runtime().events.find(event);
  if (found == runtime().events.end()) {
    return report(cudaErrorInvalidResourceHandle);
  }
  if (const cudaError_t refused = refuse_wait(found->second); refused != cudaSuccess) {
    return refused;
  }
  if (found->second.stream != nullptr) {
    run_until(*found->second.stream, found->second.ticket);
  }
  ++runtime().counts.host_waits;
  return report(cudaSuccess);
}

// Who asks often enough must be told yes one day: asking runs what comes before.
cudaError_t cudaEventQuery(cudaEvent_t event) {
  return cudaEventSynchronize(event);
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t stop) {
  const Lock lock(runtime().mutex);
  const auto from = runtime().events.find(start), to = runtime().events.find(stop);
  if (from == runtime().events.end() || to == runtime().events.end()) {
    return report(cudaErrorInvalidResourceHandle);
  }
  if (from->second.capture != nullptr || to->second.capture != nullptr) {
    return report(cudaErrorCapturedEvent);
  }
  if (!from->second.timing || !to->second.timing || !is_reached(from->second) ||
      !is_reached(to->second)) {
    return report(cudaErrorInvalidResourceHandle);
  }
  *milliseconds =
      std::chrono::duration<float, std::milli>(*to->second.reached - *from->second.reached).count();
  return report(cudaSuccess);
}
