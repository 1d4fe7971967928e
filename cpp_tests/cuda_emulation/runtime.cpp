// The host API: one device, streams that run as late as they may.
#include "runtime.h"

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "block.h"
#include "memory.h"

namespace cuda_emulation {
namespace {

std::atomic<int> multiprocessors{1};
std::atomic<int> device_count{1};
std::atomic<unsigned> contexts{0};  // a bit for each device
thread_local int current_device = 0;

bool is_device(int device) {
  return device >= 0 && device < device_count.load();
}

int context_state(int device, unsigned* flags, int* active) {
  *flags = 0;
  *active = static_cast<int>(contexts.load() >> device & 1);
  return 0;
}

bool is_valid(const dim3& grid, const dim3& block) {
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  return threads >= 1 && threads <= kMaxThreads && block.z <= 64 && grid.x >= 1 && grid.y >= 1 &&
         grid.z >= 1 && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535;
}

std::size_t shared_bytes(const std::vector<SharedVariable>& variables) {
  std::size_t bytes = 0;
  for (const SharedVariable& variable : variables) {
    bytes += variable.bytes;
  }
  return bytes;
}

void run_grid(const cudaLaunchConfig_t& config, const void* kernel,
              const std::function<void()>& thread) {
  const DeviceAccess access;
  static std::uint64_t launch = 0;
  const dim3& grid = config.gridDim;
  const std::uint64_t plane = std::uint64_t{grid.x} * grid.y;
  const BlockLaunch each = {thread, grid, config.blockDim, config.dynamicSmemBytes,
                            shared_variables(kernel)};
  ++launch;
  try {
    for (std::uint64_t turn = 0; turn < plane * grid.z; ++turn) {
      const std::uint64_t at = block_at(turn, plane * grid.z, launch);
      const uint3 block = {unsigned(at % grid.x), unsigned(at % plane / grid.x),
                           unsigned(at / plane)};
      run_block(each, block);
    }
  } catch (const KernelFault& found) {
    fault(cudaErrorLaunchFailure, found.what());
  }
}

}  // namespace

Runtime& runtime() {
  static auto* const only = new Runtime;
  return *only;
}

cudaError_t report(cudaError_t error) {
  Runtime& own = runtime();
  const cudaError_t found = own.sticky != cudaSuccess ? own.sticky : error;
  own.last = found != cudaSuccess ? found : own.last;
  return found;
}

cudaError_t fault(cudaError_t error, const std::string& text) {
  Runtime& own = runtime();
  if (own.sticky == cudaSuccess) {
    own.sticky = error;
    own.fault = text;
  }
  return report(error);
}

std::shared_ptr<Stream> find(cudaStream_t handle) {
  Runtime& own = runtime();
  if (reinterpret_cast<std::uintptr_t>(handle) <= 2) {
    return own.default_stream;
  }
  const auto found = own.streams.find(handle);
  return found == own.streams.end() ? nullptr : found->second;
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

void run_all() {
  run_until(*runtime().default_stream, runtime().default_stream->enqueued);
  for (const auto& entry : runtime().streams) {
    run_until(*entry.second, entry.second->enqueued);
  }
}

bool is_device_address(const void* pointer) {
  const Lock lock(runtime().mutex);
  return is_allocated(pointer);
}

Counts counts() {
  const Lock lock(runtime().mutex);
  return runtime().counts;
}

void set_multiprocessors(int count) {
  multiprocessors = count;
}

void set_device_count(int count) {
  device_count = count;
}

bool has_context(int device) {
  return (contexts.load() >> device & 1) != 0;
}

cudaError_t enqueue_launch(const cudaLaunchConfig_t& config, const void* kernel,
                           std::function<void()> thread) {
  const Lock lock(runtime().mutex);
  const std::shared_ptr<Stream> stream = find(config.stream);
  if (stream == nullptr) {
    return report(cudaErrorInvalidResourceHandle);
  }
  if (!is_valid(config.gridDim, config.blockDim) ||
      shared_bytes(shared_variables(kernel)) + config.dynamicSmemBytes > kMaxShared) {
    return report(cudaErrorInvalidConfiguration);
  }
  runtime().kernels.insert(kernel);
  runtime().counts.kernels = runtime().kernels.size();
  return enqueue(
      *stream, [config, kernel, thread = std::move(thread)] { run_grid(config, kernel, thread); },
      &Counts::launches);
}

}  // namespace cuda_emulation

using namespace cuda_emulation;

// For tests in other languages.
extern "C" __attribute__((visibility("default"), used)) void cuda_emulation_set_multiprocessors(
    int count) {
  set_multiprocessors(count);
}

// The same: fills an array of the fields of Counts and returns how many.
extern "C" __attribute__((visibility("default"), used)) int cuda_emulation_counts(
    std::uint64_t* fields) {
  const Counts found = counts();
  std::memcpy(fields, &found, sizeof found);
  return sizeof found / sizeof *fields;
}

// The same: a copy that others make, of which this runtime knows nothing; in memory of the device
// or of the host, from row to row so many bytes.
extern "C" __attribute__((visibility("default"), used)) void cuda_emulation_copy_rows(
    char* to, std::ptrdiff_t to_pitch, const char* from, std::ptrdiff_t from_pitch,
    std::size_t width, std::ptrdiff_t rows) {
  const Lock lock(runtime().mutex);
  const DeviceAccess access;
  for (std::ptrdiff_t row = 0; row < rows; ++row) {
    std::memcpy(to + row * to_pitch, from + row * from_pitch, width);
  }
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
  *count = device_count.load();
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device < device_count.load() ? current_device : 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (!is_device(device)) {
    return report(cudaErrorInvalidDevice);
  }
  current_device = device;
  contexts |= 1u << device;
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool known = std::strcmp(symbol, "cuDevicePrimaryCtxGetState") == 0;
  *function = known ? reinterpret_cast<void*>(&context_state) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  *properties = {"emulated on the CPU", 7, 5, std::size_t{1} << 30, 1};
  return is_device(device) ? cudaSuccess : report(cudaErrorInvalidDevice);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  *value = attribute == cudaDevAttrIntegrated            ? 0
           : attribute == cudaDevAttrMultiProcessorCount ? multiprocessors.load()
                                                         : 1;
  return is_device(device) ? cudaSuccess : report(cudaErrorInvalidDevice);
}

cudaError_t cudaDeviceReset() {
  const Lock lock(runtime().mutex);
  Runtime& own = runtime();
  own.streams.clear();
  own.events.clear();
  own.execs.clear();
  own.graphs.clear();
  own.captures.clear();
  own.default_stream = std::make_shared<Stream>();
  own.sticky = own.last = cudaSuccess;
  own.fault.clear();
  device_count = 1;
  contexts = 0;
  current_device = 0;
  release_all();
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  const Lock lock(runtime().mutex);
  if (flags != cudaStreamNonBlocking) {  // others would wait for the default stream
    return report(cudaErrorInvalidValue);
  }
  *stream = new_handle<cudaStream_t>();
  runtime().streams[*stream] = std::make_shared<Stream>();
  return report(cudaSuccess);
}

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  const Lock lock(runtime().mutex);
  const std::shared_ptr<Stream> stream = find(handle);
  if (stream == nullptr || runtime().streams.erase(handle) == 0) {
    return report(cudaErrorInvalidResourceHandle);
  }
  if (stream->capture != nullptr) {
    return lose(stream);
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
  if (stream->capture != nullptr) {
    return refuse(*stream->capture, cudaErrorStreamCaptureUnsupported);
  }
  if (const cudaError_t refused = refuse_unsafe_call(); refused != cudaSuccess) {
    return refused;
  }
  run_until(*stream, stream->enqueued);
  ++runtime().counts.host_waits;
  return report(cudaSuccess);
}

// Who asks often enough must be told yes one day: asking runs what is enqueued.
cudaError_t cudaStreamQuery(cudaStream_t handle) {
  return cudaStreamSynchronize(handle);
}
