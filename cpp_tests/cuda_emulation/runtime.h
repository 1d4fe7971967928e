// What the emulated device remembers between calls, and what the files of the host API share.
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
#include <thread>
#include <vector>

namespace cuda_emulation {

using Clock = std::chrono::steady_clock;
using Counter = std::uint64_t Counts::*;

// One piece of work in a graph.
struct Node {
  std::function<void()> task;   // empty for an event
  cudaEvent_t event = nullptr;  // that each launch reaches anew
  Counter counter = nullptr;    // what a launch counts it as
  std::set<std::size_t> after;  // the nodes that come before it
};

// Memory that belongs to a graph, whose nodes allocate and free it.
struct GraphMemory {
  std::set<void*> allocated;
  ~GraphMemory();
};

// A sequence of work that is recorded, from cudaStreamBeginCapture on.
struct Capture {
  std::thread::id thread;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  bool is_active = true;
  bool is_valid = true;
  std::vector<Node> nodes;
  std::shared_ptr<GraphMemory> memory = std::make_shared<GraphMemory>();
};

// Work that nothing has waited for yet. The GPU behind it is as slow as can be: whoever forgets to
// wait reads what was there before.
struct Stream {
  std::deque<std::function<void()>> tasks;
  std::uint64_t enqueued = 0;
  std::uint64_t done = 0;
  std::shared_ptr<Capture> capture;  // null while its work runs
  bool is_origin = false;            // the capture began on it
  std::set<std::size_t> known;       // nodes of the capture that its next one comes after
};

struct Event {
  std::shared_ptr<Stream> stream;  // null until recorded
  std::uint64_t ticket = 0;        // tasks of the stream that come before it
  std::shared_ptr<Clock::time_point> reached;
  bool timing = false;
  std::shared_ptr<Capture> capture;  // where it was last recorded in one
  std::set<std::size_t> known;       // nodes that come before it
};

struct Graph {
  std::vector<Node> nodes;
  std::shared_ptr<GraphMemory> memory;
};

// What cudaGraphInstantiate makes: unlike a graph, it remembers its last launch.
struct GraphExec {
  std::shared_ptr<const Graph> graph;
  std::shared_ptr<Stream> last_stream;
  std::uint64_t last_ticket = 0;
  std::uint64_t launches = 0;
};

struct Runtime {
  std::recursive_mutex mutex;
  std::map<cudaStream_t, std::shared_ptr<Stream>> streams;
  std::map<cudaEvent_t, Event> events;
  std::map<cudaGraph_t, std::shared_ptr<const Graph>> graphs;
  std::map<cudaGraphExec_t, GraphExec> execs;
  std::vector<std::shared_ptr<Capture>> captures;  // those under way
  std::shared_ptr<Stream> default_stream = std::make_shared<Stream>();
  std::uintptr_t next_handle = 0x1000;
  cudaError_t sticky = cudaSuccess;  // as on a GPU, after a fault every call fails
  cudaError_t last = cudaSuccess;
  std::string fault;
  Counts counts = {};
  std::set<const void*> kernels;  // those launched so far
};

Runtime& runtime();
using Lock = std::lock_guard<std::recursive_mutex>;

cudaError_t report(cudaError_t error);
// From now on every call fails.
cudaError_t fault(cudaError_t error, const std::string& text);
// Null for what is no stream. 0 and cudaStreamLegacy (1) are the default stream; so is
// cudaStreamPerThread (2), which waits for it as it waits for that.
std::shared_ptr<Stream> find(cudaStream_t handle);
template <typename Handle>
Handle new_handle() {
  return reinterpret_cast<Handle>(runtime().next_handle++);
}

// Adds work to the stream, or to the graph that the stream is recorded into.
cudaError_t enqueue(Stream& stream, std::function<void()> task, Counter counter = nullptr);
void run_until(Stream& stream, std::uint64_t ticket);
void run_all();  // on every stream
void copy(void* to, const void* from, std::size_t bytes);

// ---- graphs.cpp ----
// Spoils a capture and returns the error.
cudaError_t refuse(Capture& capture, cudaError_t error);
// What allocates, waits or queries is refused in a thread that captures, and spoils the capture.
cudaError_t refuse_unsafe_call();
cudaError_t record(Stream& stream, Node node);
// What becomes of a capture one of whose streams is destroyed.
cudaError_t lose(const std::shared_ptr<Stream>& stream);

}  // namespace cuda_emulation

struct EmulatedMemPool {
  std::uint64_t release_threshold = 0;
};
