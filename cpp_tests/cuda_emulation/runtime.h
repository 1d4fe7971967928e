// What the emulated device remembers between calls.
#pragma once

#include <cuda_runtime_api.h>

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>

namespace cuda_emulation {

using Clock = std::chrono::steady_clock;

// Work that nothing has waited for yet. The GPU behind it is as slow as can be: whoever forgets to
// wait reads what was there before.
struct Stream {
  std::deque<std::function<void()>> tasks;
  std::uint64_t enqueued = 0;
  std::uint64_t done = 0;
};

struct Event {
  std::shared_ptr<Stream> stream;  // null until recorded
  std::uint64_t ticket = 0;        // tasks of the stream that come before it
  std::shared_ptr<Clock::time_point> reached;
  bool timing = false;
};

struct Runtime {
  std::recursive_mutex mutex;
  std::map<cudaStream_t, std::shared_ptr<Stream>> streams;
  std::map<cudaEvent_t, Event> events;
  std::shared_ptr<Stream> default_stream = std::make_shared<Stream>();
  std::uintptr_t next_handle = 0x1000;
  cudaError_t sticky = cudaSuccess;  // as on a GPU, after a fault every call fails
  cudaError_t last = cudaSuccess;
  std::string fault;
  Counts counts = {};
  std::set<const void*> kernels;  // those launched so far
};

}  // namespace cuda_emulation

struct EmulatedMemPool {
  std::uint64_t release_threshold = 0;
};
