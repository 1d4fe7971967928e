// Work of a stream recorded as a CUDA graph, and what has to wait while a stream is recorded.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "zsseg/tensor_view.h"

namespace zsseg::cuda {

// Whether what is enqueued on the stream is recorded now instead of run.
bool is_captured(StreamHandle stream, int device);

// A CUDA graph that is ready to launch.
struct Recording {
  std::uintptr_t handle = 0;
  std::size_t nodes = 0;
};

// From begin to end, work on the stream is recorded and does not run. Both in one thread, which may
// not wait, query or allocate in between; other threads may, on other streams. Throws CaptureError.
void begin_capture(StreamHandle stream, int device);
// Throws CaptureError where CUDA refused anything since; the stream then works as before.
Recording end_capture(StreamHandle stream, int device);
void cancel_capture(StreamHandle stream, int device) noexcept;

// Runs the recorded work on the addresses it was recorded with, as one item of the stream.
void launch_recording(const Recording& recording, StreamHandle stream, int device);
void destroy_recording(const Recording& recording, int device) noexcept;

// Makes `later` wait for all that `earlier` holds now. Throws CaptureError where one of them is
// captured and the other is not. No capture begins here meanwhile.
void order_streams(StreamHandle earlier, StreamHandle later, int device);

// Runs `task`, which frees something, now or as soon as the stream is not captured. `waits` tells
// that it waits for the device: then as soon as nothing is. Errors of CUDA are dropped.
void run_outside_captures(StreamHandle stream, int device, bool waits,
                          std::function<void()> task) noexcept;
// Runs what has been put off and may run now. Anything that allocates calls it.
void run_deferred() noexcept;

}  // namespace zsseg::cuda
