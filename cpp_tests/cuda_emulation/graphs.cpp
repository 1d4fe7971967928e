// Stream capture and graphs. Where CUDA leaves it open whether a call may be captured, it may not.
#include <algorithm>
#include <iterator>
#include <utility>

#include "memory.h"
#include "runtime.h"

namespace cuda_emulation {
namespace {

std::shared_ptr<Capture> own_capture() {
  for (const std::shared_ptr<Capture>& capture : runtime().captures) {
    if (capture->mode == cudaStreamCaptureModeGlobal ||
        (capture->mode == cudaStreamCaptureModeThreadLocal &&
         capture->thread == std::this_thread::get_id())) {
      return capture;
    }
  }
  return nullptr;
}

void leave(Stream& stream) {
  stream.capture = nullptr;
  stream.is_origin = false;
  stream.known.clear();
}

void finish(const std::shared_ptr<Capture>& capture) {
  Runtime& own = runtime();
  capture->is_active = false;
  for (const auto& entry : own.streams) {
    if (entry.second->capture == capture) {
      leave(*entry.second);
    }
  }
  own.captures.erase(std::find(own.captures.begin(), own.captures.end(), capture));
}

cudaError_t status_of_end(const Stream& stream) {
  const Capture& capture = *stream.capture;
  if (capture.mode != cudaStreamCaptureModeRelaxed &&
      capture.thread != std::this_thread::get_id()) {
    return cudaErrorStreamCaptureWrongThread;
  }
  if (!stream.is_origin) {
    return cudaErrorStreamCaptureUnmatched;
  }
  if (!capture.is_valid) {
    return cudaErrorStreamCaptureInvalidated;
  }
  return stream.known.size() == capture.nodes.size() ? cudaSuccess : cudaErrorStreamCaptureUnjoined;
}

// Runs every node after those it depends on; of those that may come next the first or the last one
// recorded, in turn, so that a dependency that is missing shows.
void replay(const Graph& graph, const std::vector<std::shared_ptr<Clock::time_point>>& reached,
            bool backwards) {
  std::set<std::size_t> left;
  for (std::size_t index = 0; index < graph.nodes.size(); ++index) {
    left.insert(index);
  }
  const auto is_ready = [&](std::size_t index) {
    const std::set<std::size_t>& after = graph.nodes[index].after;
    return std::none_of(after.begin(), after.end(),
                        [&left](std::size_t earlier) { return left.count(earlier) != 0; });
  };
  while (!left.empty() && runtime().sticky == cudaSuccess) {
    const std::size_t next = backwards ? *std::find_if(left.rbegin(), left.rend(), is_ready)
                                       : *std::find_if(left.begin(), left.end(), is_ready);
    left.erase(next);
    if (reached[next] != nullptr) {
      *reached[next] = Clock::now();
    } else {
      graph.nodes[next].task();
    }
  }
}

bool has_all_events(const Graph& graph) {
  return std::all_of(graph.nodes.begin(), graph.nodes.end(), [](const Node& node) {
    return node.event == nullptr || runtime().events.count(node.event) != 0;
  });
}

// The events of a graph belong to its last launch.
std::vector<std::shared_ptr<Clock::time_point>> renew_events(
    const Graph& graph, const std::shared_ptr<Stream>& stream) {
  std::vector<std::shared_ptr<Clock::time_point>> reached;
  for (const Node& node : graph.nodes) {
    if (node.event == nullptr) {
      reached.push_back(nullptr);
      continue;
    }
    reached.push_back(std::make_shared<Clock::time_point>());
    Event& event = runtime().events[node.event];
    event.stream = stream;
    event.ticket = stream->enqueued + 1;
    event.reached = reached.back();
    event.capture = nullptr;
  }
  return reached;
}

void count(const Graph& graph) {
  Counts& counts = runtime().counts;
  ++counts.graph_launches;
  for (const Node& node : graph.nodes) {
    if (node.counter != nullptr) {
      ++(counts.*node.counter);
    }
  }
}

}  // namespace

GraphMemory::~GraphMemory() {
  for (void* pointer : allocated) {
    release(pointer);
  }
}

cudaError_t refuse(Capture& capture, cudaError_t error) {
  capture.is_valid = false;
  return report(error);
}

cudaError_t refuse_unsafe_call() {
  const std::shared_ptr<Capture> capture = own_capture();
  return capture == nullptr ? cudaSuccess : refuse(*capture, cudaErrorStreamCaptureUnsupported);
}

cudaError_t record(Stream& stream, Node node) {
  Capture& capture = *stream.capture;
  if (!capture.is_valid) {
    return report(cudaErrorStreamCaptureInvalidated);
  }
  node.after = stream.known;
  stream.known.insert(capture.nodes.size());
  capture.nodes.push_back(std::move(node));
  return report(cudaSuccess);
}

cudaError_t lose(const std::shared_ptr<Stream>& stream) {
  const std::shared_ptr<Capture> capture = stream->capture;
  const bool is_origin = stream->is_origin;
  leave(*stream);
  if (is_origin) {
    finish(capture);
  }
  return refuse(*capture, cudaErrorStreamCaptureInvalidated);
}

cudaError_t enqueue(Stream& stream, std::function<void()> task, Counter counter) {
  if (stream.capture != nullptr) {
    return record(stream, {std::move(task), nullptr, counter, {}});
  }
  const std::shared_ptr<Capture> capture = own_capture();
  if (&stream == runtime().default_stream.get() && capture != nullptr) {
    return refuse(*capture, cudaErrorStreamCaptureImplicit);
  }
  stream.tasks.push_back(std::move(task));
  ++stream.enqueued;
  if (counter != nullptr) {
    ++(runtime().counts.*counter);
  }
  return report(cudaSuccess);
}

}  // namespace cuda_emulation

using namespace cuda_emulation;

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  const Lock lock(runtime().mutex);
  const std::shared_ptr<Stream> stream = find(handle);
  if (stream == nullptr) {
    return report(cudaErrorInvalidResourceHandle);
  }
  if (stream == runtime().default_stream) {
    return report(cudaErrorStreamCaptureUnsupported);
  }
  if (stream->capture != nullptr) {
    return report(cudaErrorIllegalState);
  }
  stream->capture = std::make_shared<Capture>();
  stream->capture->thread = std::this_thread::get_id();
  stream->capture->mode = mode;
  stream->is_origin = true;
  runtime().captures.push_back(stream->capture);
  return report(cudaSuccess);
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  const Lock lock(runtime().mutex);
  *graph = nullptr;
  const std::shared_ptr<Stream> stream = find(handle);
  if (stream == nullptr) {
    return report(cudaErrorInvalidResourceHandle);
  }
  if (stream->capture == nullptr) {
    return report(cudaErrorIllegalState);
  }
  const cudaError_t status = status_of_end(*stream);
  if (status == cudaErrorStreamCaptureWrongThread || status == cudaErrorStreamCaptureUnmatched) {
    return refuse(*stream->capture, status);
  }
  const std::shared_ptr<Capture> capture = stream->capture;
  finish(capture);
  if (status == cudaSuccess) {
    *graph = new_handle<cudaGraph_t>();
    runtime().graphs[*graph] =
        std::make_shared<Graph>(Graph{std::move(capture->nodes), capture->memory});
  }
  return report(status);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  const Lock lock(runtime().mutex);
  const std::shared_ptr<Stream> stream = find(handle);
  if (stream == nullptr) {
    return report(cudaErrorInvalidResourceHandle);
  }
  *status = stream->capture == nullptr  ? cudaStreamCaptureStatusNone
            : stream->capture->is_valid ? cudaStreamCaptureStatusActive
                                        : cudaStreamCaptureStatusInvalidated;
  return report(cudaSuccess);
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, std::size_t* count) {
  const Lock lock(runtime().mutex);
  const auto found = runtime().graphs.find(graph);
  if (found == runtime().graphs.end() || nodes != nullptr) {
    return report(cudaErrorInvalidValue);
  }
  *count = found->second->nodes.size();
  return report(cudaSuccess);
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  const Lock lock(runtime().mutex);
  const auto found = runtime().graphs.find(graph);
  if (found == runtime().graphs.end()) {
    return report(cudaErrorInvalidValue);
  }
  if (const cudaError_t refused = refuse_unsafe_call(); refused != cudaSuccess) {
    return refused;
  }
  *exec = new_handle<cudaGraphExec_t>();
  runtime().execs[*exec].graph = found->second;
  return report(cudaSuccess);
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  const Lock lock(runtime().mutex);
  return report(runtime().graphs.erase(graph) == 1 ? cudaSuccess : cudaErrorInvalidValue);
}

// One launch of a graph runs after the other, whatever their streams.
cudaError_t cudaGraphLaunch(cudaGraphExec_t handle, cudaStream_t on) {
  const Lock lock(runtime().mutex);
  const std::shared_ptr<Stream> stream = find(on);
  const auto found = runtime().execs.find(handle);
  if (stream == nullptr || found == runtime().execs.end() ||
      !has_all_events(*found->second.graph)) {
    return report(cudaErrorInvalidResourceHandle);
  }
  if (stream->capture != nullptr) {
    return refuse(*stream->capture, cudaErrorStreamCaptureUnsupported);
  }
  GraphExec& exec = found->second;
  const auto reached = renew_events(*exec.graph, stream);
  const bool backwards = ++exec.launches % 2 == 0;
  const cudaError_t status =
      enqueue(*stream, [graph = exec.graph, reached, backwards, earlier = exec.last_stream,
                        ticket = exec.last_ticket, self = stream.get()] {
        if (earlier != nullptr && earlier.get() != self) {
          run_until(*earlier, ticket);
        }
        replay(*graph, reached, backwards);
      });
  if (status == cudaSuccess) {
    count(*exec.graph);
    exec.last_stream = stream;
    exec.last_ticket = stream->enqueued;
  }
  return status;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  const Lock lock(runtime().mutex);
  if (const cudaError_t refused = refuse_unsafe_call(); refused != cudaSuccess) {
    return refused;
  }
  return report(runtime().execs.erase(exec) == 1 ? cudaSuccess : cudaErrorInvalidValue);
}
