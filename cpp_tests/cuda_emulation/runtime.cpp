// The host API: one device, streams that run as late as they may.
#include "runtime.h"

#include <cuda_runtime_api.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "block.h"
#include "memory.h"

namespace cuda_emulation {
namespace {

Runtime& runtime() {
  static auto* const only = new Runtime;
  return *only;
}

using Lock = std::lock_guard<std::recursive_mutex>;

cudaError_t report(cudaError_t error) {
  Runtime& own = runtime();
  own.last = own.sticky != cudaSuccess ? own.sticky : error;
  return own.last;
}

cudaError_t fault(cudaError_t error, const std::string& text) {
  Runtime& own = runtime();
  if (own.sticky == cudaSuccess) {
    own.sticky = error;
    own.fault = text;
  }
  return report(error);
}

// 0 and cudaStreamLegacy (1) are the default stream; so is cudaStreamPerThread (2), which waits for
// it as it waits for that.
std::shared_ptr<Stream> find(cudaStream_t handle) {
  Runtime& own = runtime();
  if (reinterpret_cast<std::uintptr_t>(handle) <= 2) {
    return own.default_stream;
  }
  const auto found = own.streams.find(handle);
  return found == own.streams.end() ? nullptr : found->second;
}

void enqueue(Stream& stream, std::function<void()> task) {
  stream.tasks.push_back(std::move(task));
  ++stream.enqueued;
}

void run_until(Stream& stream, std::uint64_t ticket) {
  while (stream.done < ticket && !stream.tasks.empty()) {
    const std::function<void()> task = std::move(stream.tasks.front());
    stream.tasks.pop_front();
    if (runtime().sticky == cudaSuccess) {
      task();
    }
    ++stream.done;
  }
}

bool is_valid(const dim3& grid, const dim3& block) {
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  return threads >= 1 && threads <= kMaxThreads && block.z <= 64 && grid.x >= 1 && grid.y >= 1 &&
         grid.z >= 1 && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535;
}

void run_grid(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  const DeviceAccess access;
  static std::uint64_t launch = 0;
  const dim3& grid = config.gridDim;
  const std::uint64_t plane = std::uint64_t{grid.x} * grid.y;
  ++launch;
  try {
    for (std::uint64_t turn = 0; turn < plane * grid.z; ++turn) {
      const std::uint64_t at = block_at(turn, plane * grid.z, launch);
      const uint3 block = {unsigned(at % grid.x), unsigned(at % plane / grid.x),
                           unsigned(at / plane)};
      run_block(thread, grid, config.blockDim, block, config.dynamicSmemBytes);
    }
  } catch (const KernelFault& found) {
    fault(cudaErrorLaunchFailure, found.what());
  }
}

void copy(void* to, const void* from, std::size_t bytes) {
  const DeviceAccess access;
  std::memcpy(to, from, bytes);
}

bool are_on(cudaMemcpyKind kind, const void* to, const void* from) {
  return is_allocated(to) == (kind != cudaMemcpyDeviceToHost) &&
         is_allocated(from) == (kind != cudaMemcpyHostToDevice);
}

}  // namespace

bool is_device_address(const void* pointer) {
  const Lock lock(runtime().mutex);
  return is_allocated(pointer);
}

Counts counts() {
  const Lock lock(runtime().mutex);
  return runtime().counts;
}

cudaError_t enqueue_launch(const cudaLaunchConfig_t& config, const void* kernel,
                           std::function<void()> thread) {
  const Lock lock(runtime().mutex);
  const std::shared_ptr<Stream> stream = find(config.stream);
  if (stream == nullptr) {
    return report(cudaErrorInvalidResourceHandle);
  }
  if (!is_valid(config.gridDim, config.blockDim) || config.dynamicSmemBytes > kMaxDynamicShared) {
    return report(cudaErrorInvalidConfiguration);
  }
  enqueue(*stream, [config, thread = std::move(thread)] { run_grid(config, thread); });
  runtime().kernels.insert(kernel);
  runtime().counts.kernels = runtime().kernels.size();
  ++runtime().counts.launches;
  return report(cudaSuccess);
}

}  // namespace cuda_emulation

using namespace cuda_emulation;

// For tests in other languages: fills an array of the fields of Counts and returns how many.
extern "C" __attribute__((visibility("default"), used)) int cuda_emulation_counts(
    std::uint64_t* fields) {
  const Counts found = counts();
  std::memcpy(fields, &found, sizeof found);
  return sizeof found / sizeof *fields;
}

cudaError_t cudaGetLastError() {
  const Lock lock(runtime().mutex);
  const cudaError_t last = runtime().last;
  runtime().last = runtime().sticky;
  return last;
}

const char* cudaGetErrorString(cudaError_t error) {
  const Lock lock(runtime().mutex);
  return error == runtime().sticky && !runtime().fault.empty() ? runtime().fault.c_str()
                                                               : cudaGetErrorName(error);
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : report(cudaErrorInvalidDevice);
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  *properties = {"emulated on the CPU", 7, 5, std::size_t{1} << 30, 1};
  return cudaSetDevice(device);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = 1;
  return cudaSetDevice(device);
}

cudaError_t cudaDeviceReset() {
  const Lock lock(runtime().mutex);
  Runtime& own = runtime();
  own.streams.clear();
  own.events.clear();
  own.default_stream = std::make_shared<Stream>();
  own.sticky = own.last = cudaSuccess;
  own.fault.clear();
  release_all();
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** pointer, std::size_t bytes) {
  const Lock lock(runtime().mutex);
  *pointer = allocate(bytes);
  runtime().counts.allocations += *pointer != nullptr ? 1 : 0;
  return report(*pointer != nullptr ? cudaSuccess : cudaErrorMemoryAllocation);
}

cudaError_t cudaMallocAsync(void** pointer, std::size_t bytes, cudaStream_t stream) {
  const Lock lock(runtime().mutex);
  return find(stream) != nullptr ? cudaMalloc(pointer, bytes)
                                 : report(cudaErrorInvalidResourceHandle);
}

cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps* properties) {
  if (properties->allocType != cudaMemAllocationTypePinned ||
      properties->location.type != cudaMemLocationTypeDevice || properties->location.id != 0) {
    return report(cudaErrorInvalidValue);
  }
  *pool = new EmulatedMemPool;  // programs keep theirs to the end
  return report(cudaSuccess);
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, cudaMemPoolAttr, void* value) {
  pool->release_threshold = *static_cast<std::uint64_t*>(value);
  return report(cudaSuccess);
}

cudaError_t cudaMallocFromPoolAsync(void** pointer, std::size_t bytes, cudaMemPool_t pool,
                                    cudaStream_t stream) {
  const Lock lock(runtime().mutex);
  runtime().counts.kept_allocations += pool->release_threshold > 0 ? 1 : 0;
  return cudaMallocAsync(pointer, bytes, stream);
}

// Waits for the device, as CUDA's own does.
cudaError_t cudaFree(void* pointer) {
  const Lock lock(runtime().mutex);
  run_until(*runtime().default_stream, runtime().default_stream->enqueued);
  for (const auto& entry : runtime().streams) {
    run_until(*entry.second, entry.second->enqueued);
  }
  ++runtime().counts.frees;
  ++runtime().counts.host_waits;
  return pointer == nullptr || release(pointer)
             ? report(cudaSuccess)
             : fault(cudaErrorIllegalAddress, "freed twice, or written outside its bounds");
}

cudaError_t cudaFreeAsync(void* pointer, cudaStream_t handle) {
  const Lock lock(runtime().mutex);
  const std::shared_ptr<Stream> stream = find(handle);
  if (stream == nullptr) {
    return report(cudaErrorInvalidResourceHandle);
  }
  ++runtime().counts.frees;
  enqueue(*stream, [pointer] {
    if (!release(pointer)) {
      fault(cudaErrorIllegalAddress, "freed twice, or written outside its bounds");
    }
  });
  return report(cudaSuccess);
}

// Host memory is pageable: read during the call, and written before it returns.
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t handle) {
  const Lock lock(runtime().mutex);
  const std::shared_ptr<Stream> stream = find(handle);
  if (stream == nullptr) {
    return report(cudaErrorInvalidResourceHandle);
  }
  if (!are_on(kind, to, from)) {
    return report(cudaErrorInvalidValue);
  }
  if (kind == cudaMemcpyHostToDevice) {
    const auto* first = static_cast<const char*>(from);
    enqueue(*stream, [to, staged = std::vector<char>(first, first + bytes)] {
      copy(to, staged.data(), staged.size());
    });
    ++runtime().counts.copies_to_device;
    return report(cudaSuccess);
  }
  enqueue(*stream, [=] { copy(to, from, bytes); });
  if (kind == cudaMemcpyDeviceToHost) {
    ++runtime().counts.copies_to_host;
    ++runtime().counts.host_waits;
    run_until(*stream, stream->enqueued);
  } else {
    ++runtime().counts.copies_on_device;
  }
  return report(cudaSuccess);
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  const bool on_device = is_device_address(pointer);
  *attributes = {on_device ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered, on_device ? 0 : -2};
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  const Lock lock(runtime().mutex);
  if (flags != cudaStreamNonBlocking) {  // others would wait for the default stream
    return report(cudaErrorInvalidValue);
  }
  *stream = reinterpret_cast<cudaStream_t>(runtime().next_handle++);
  runtime().streams[*stream] = std::make_shared<Stream>();
  return report(cudaSuccess);
}

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  const Lock lock(runtime().mutex);
  const std::shared_ptr<Stream> stream = find(handle);
  if (stream == nullptr || runtime().streams.erase(handle) == 0) {
    return report(cudaErrorInvalidResourceHandle);
  }
  run_until(*stream, stream->enqueued);  // no one can wait for it any more
  return report(cudaSuccess);
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  const Lock lock(runtime().mutex);
  const std::shared_ptr<Stream> stream = find(handle);
  if (stream == nullptr) {
    return report(cudaErrorInvalidResourceHandle);
  }
  run_until(*stream, stream->enqueued);
  ++runtime().counts.host_waits;
  return report(cudaSuccess);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  const Lock lock(runtime().mutex);
  const std::shared_ptr<Stream> stream = find(handle);
  const auto found = runtime().events.find(event);
  if (stream == nullptr || found == runtime().events.end()) {
    return report(cudaErrorInvalidResourceHandle);
  }
  if (found->second.stream != nullptr) {
    enqueue(*stream, [earlier = found->second.stream, ticket = found->second.ticket] {
      run_until(*earlier, ticket);
    });
    ++runtime().counts.stream_waits;
  }
  return report(cudaSuccess);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  const Lock lock(runtime().mutex);
  *event = reinterpret_cast<cudaEvent_t>(runtime().next_handle++);
  runtime().events[*event].timing = (flags & cudaEventDisableTiming) == 0;
  ++runtime().counts.events_made;
  return report(cudaSuccess);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  const Lock lock(runtime().mutex);
  return report(runtime().events.erase(event) == 1 ? cudaSuccess : cudaErrorInvalidResourceHandle);
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
  const Lock lock(runtime().mutex);
  const std::shared_ptr<Stream> stream = find(handle);
  const auto found = runtime().events.find(event);
  if (stream == nullptr || found == runtime().events.end()) {
    return report(cudaErrorInvalidResourceHandle);
  }
  auto reached = std::make_shared<Clock::time_point>();
  enqueue(*stream, [reached] { *reached = Clock::now(); });
  found->second.stream = stream;
  found->second.ticket = stream->enqueued;
  found->second.reached = reached;
  ++runtime().counts.events_recorded;
  return report(cudaSuccess);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const Lock lock(runtime().mutex);
  const auto found = runtime().events.find(event);
  if (found == runtime().events.end()) {
    return report(cudaErrorInvalidResourceHandle);
  }
  if (found->second.stream != nullptr) {
    run_until(*found->second.stream, found->second.ticket);
  }
  ++runtime().counts.host_waits;
  return report(cudaSuccess);
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t stop) {
  const Lock lock(runtime().mutex);
  const auto from = runtime().events.find(start), to = runtime().events.find(stop);
  if (from == runtime().events.end() || to == runtime().events.end() || !from->second.timing ||
      !to->second.timing || from->second.stream == nullptr || to->second.stream == nullptr ||
      from->second.stream->done < from->second.ticket ||
      to->second.stream->done < to->second.ticket) {
    return report(cudaErrorInvalidResourceHandle);
  }
  *milliseconds =
      std::chrono::duration<float, std::milli>(*to->second.reached - *from->second.reached).count();
  return report(cudaSuccess);
}
