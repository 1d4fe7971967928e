#include "zsseg/cuda_runtime.h"

#include <cuda_runtime_api.h>

#include <array>
#include <mutex>
#include <utility>

#include "zsseg/cuda_capture.h"
#include "zsseg/cuda_check.h"
#include "zsseg/cuda_raii.h"
#include "zsseg/error.h"

namespace zsseg {
namespace {

// cuDevicePrimaryCtxGetState, of the driver; null where it does not have it.
using ContextState = int (*)(int device, unsigned* flags, int* active);

ContextState find_context_state() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t status = cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", &entry,
                                                              7000, cudaEnableDefault, &result);
#else
  const cudaError_t status =
      cudaGetDriverEntryPoint("cuDevicePrimaryCtxGetState", &entry, cudaEnableDefault, &result);
#endif
  if (status != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return nullptr;
  }
  return result == cudaDriverEntryPointSuccess ? reinterpret_cast<ContextState>(entry) : nullptr;
}

}  // namespace

bool has_active_context(int device) {
  static const ContextState state = find_context_state();
  unsigned flags = 0;
  int active = 0;
  return state == nullptr || state(device, &flags, &active) != 0 || active != 0;
}

}  // namespace zsseg

namespace zsseg::cuda {
namespace {

cudaEvent_t to_event(std::uintptr_t handle) {
  return reinterpret_cast<cudaEvent_t>(handle);
}

bool has(cudaDeviceAttr attribute, int device) {
  int value = 0;
  ZSSEG_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value != 0;
}

bool has_memory_pools(int device) {
  return has(cudaDevAttrMemoryPoolsSupported, device);
}

// Freed memory beyond this many bytes goes back to the driver when a stream is waited for. CUDA's
// own pool keeps none, so that every frame would ask the driver again.
constexpr std::uint64_t kKeptBytes = std::uint64_t{64} << 20;
constexpr int kMaxDevices = 64;

cudaMemPool_t make_pool(int device) {
  cudaMemPoolProps properties = {};
  properties.allocType = cudaMemAllocationTypePinned;
  properties.location.type = cudaMemLocationTypeDevice;
  properties.location.id = device;
  cudaMemPool_t pool = nullptr;
  ZSSEG_CUDA_CHECK(cudaMemPoolCreate(&pool, &properties));
  std::uint64_t threshold = kKeptBytes;
  ZSSEG_CUDA_CHECK(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &threshold));
  return pool;
}

// The package's pool on a device, made at first use. Never destroyed: arrays may go after static
// objects have.
cudaMemPool_t pool_of(int device) {
  static std::mutex mutex;
  static auto* const pools = new std::array<cudaMemPool_t, kMaxDevices>{};
  const std::lock_guard<std::mutex> lock(mutex);
  cudaMemPool_t& pool = pools->at(static_cast<std::size_t>(device));
  if (pool == nullptr) {
    pool = make_pool(device);
  }
  return pool;
}

void copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, int device,
          StreamHandle stream) {
  if (bytes > 0) {
    const DeviceGuard guard(device);
    ZSSEG_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, kind, to_stream(stream)));
  }
}

// CUDA may record a pageable copy without a word; a launch would then read what is there no more.
void expect_recordable(const void* host, StreamHandle stream, int device) {
  if (is_captured(stream, device) && !is_pinned(host, device)) {
    throw CaptureError(
        "copy: expected pinned host memory in a capture, got pageable memory. Use a PinnedArray, "
        "or copy before the capture begins.");
  }
}

}  // namespace

bool is_built() {
  return true;
}

int runtime_version() {
  return CUDART_VERSION;
}

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return 0;
  }
  return count;
}

DeviceProperties device_properties(int device) {
  expect_device("device", device);
  cudaDeviceProp properties;
  ZSSEG_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
  int driver = 0;
  ZSSEG_CUDA_CHECK(cudaDriverGetVersion(&driver));
  return {properties.name,
          properties.major,
          properties.minor,
          properties.totalGlobalMem,
          properties.multiProcessorCount,
          driver,
          has(cudaDevAttrIntegrated, device)};
}

int set_current_device(int device, bool only_active) {
  expect_device("device", device);
  int previous = 0;
  ZSSEG_CUDA_CHECK(cudaGetDevice(&previous));
  if (!only_active || has_active_context(device)) {
    ZSSEG_CUDA_CHECK(cudaSetDevice(device));
  }
  return previous;
}

void expect_device(const char* name, int device) {
  const int count = device_count();
  if (count == 0) {
    throw DeviceError(std::string(name) + ": expected a CUDA device, got none: no NVIDIA driver, " +
                      "or one older than CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
                      std::to_string(CUDART_VERSION % 1000 / 10) +
                      " needs. Install a newer driver or use the CPU.");
  }
  if (device < 0 || device >= count) {
    throw DeviceError(std::string(name) + ": expected a CUDA device below " +
                      std::to_string(count) + ", got " + std::to_string(device) +
                      ". Run 'zsseg-rt doctor' for the list.");
  }
}

Device device_of(const void* pointer) {
  cudaPointerAttributes attributes;
  ZSSEG_CUDA_CHECK(cudaPointerGetAttributes(&attributes, pointer));
  const bool on_device =
      attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged;
  return on_device ? Device{DeviceKind::cuda, attributes.device} : Device{};
}

void* allocate(std::size_t bytes, int device, StreamHandle stream) {
  expect_device("device", device);
  const DeviceGuard guard(device);
  run_deferred();
  if (is_captured(stream, device)) {
    throw CaptureError(
        "memory: expected all of it before the capture begins, got an allocation on the stream "
        "that is recorded. Pass 'out' and 'workspace'.");
  }
  void* pointer = nullptr;
  if (has_memory_pools(device)) {
    const cudaMemPool_t pool = pool_of(device);
    ZSSEG_CUDA_CHECK(cudaMallocFromPoolAsync(&pointer, bytes, pool, to_stream(stream)));
  } else {
    ZSSEG_CUDA_CHECK(cudaMalloc(&pointer, bytes));
  }
  return pointer;
}

// Errors are dropped: a destructor calls this, possibly after the driver has shut down.
void release(void* pointer, int device, StreamHandle stream,
             std::shared_ptr<const void> owner) noexcept {
  try {
    if (has_memory_pools(device)) {
      const auto free = [pointer, device, stream, owner = std::move(owner)] {
        const DeviceGuard guard(device);
        ZSSEG_CUDA_CHECK(cudaFreeAsync(pointer, to_stream(stream)));
      };
      run_outside_captures(stream, device, false, free);
    } else {
      run_outside_captures(stream, device, true, [pointer, device] {
        const DeviceGuard guard(device);
        ZSSEG_CUDA_CHECK(cudaFree(pointer));
      });
    }
  } catch (const CudaError&) {
    return;
  }
}

void* allocate_pinned(std::size_t bytes, int device) {
  expect_device("device", device);
  const DeviceGuard guard(device);
  run_deferred();
  void* pointer = nullptr;
  ZSSEG_CUDA_CHECK(cudaHostAlloc(&pointer, bytes, cudaHostAllocPortable | cudaHostAllocMapped));
  return pointer;
}

void release_pinned(void* pointer, int device) noexcept {
  run_outside_captures(0, device, true, [pointer, device] {
    const DeviceGuard guard(device);
    ZSSEG_CUDA_CHECK(cudaFreeHost(pointer));
  });
}

void* mapped_address(void* pinned, int device) {
  const DeviceGuard guard(device);
  void* address = nullptr;
  ZSSEG_CUDA_CHECK(cudaHostGetDevicePointer(&address, pinned, 0));
  return address;
}

bool is_pinned(const void* pointer, int device) {
  const DeviceGuard guard(device);
  cudaPointerAttributes attributes;
  ZSSEG_CUDA_CHECK(cudaPointerGetAttributes(&attributes, pointer));
  return attributes.type == cudaMemoryTypeHost || attributes.type == cudaMemoryTypeManaged;
}

void copy_to_device(void* to, const void* from, std::size_t bytes, int device,
                    StreamHandle stream) {
  expect_recordable(from, stream, device);
  copy(to, from, bytes, cudaMemcpyHostToDevice, device, stream);
}

void copy_to_host(void* to, const void* from, std::size_t bytes, int device, StreamHandle stream) {
  expect_recordable(to, stream, device);
  copy(to, from, bytes, cudaMemcpyDeviceToHost, device, stream);
}

void copy_on_device(void* to, const void* from, std::size_t bytes, int device,
                    StreamHandle stream) {
  copy(to, from, bytes, cudaMemcpyDeviceToDevice, device, stream);
}

StreamHandle create_stream(int device) {
  expect_device("device", device);
  const DeviceGuard guard(device);
  cudaStream_t stream = nullptr;
  ZSSEG_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return reinterpret_cast<StreamHandle>(stream);
}

void destroy_stream(StreamHandle stream, int device) noexcept {
  static_cast<void>(device);
  static_cast<void>(cudaStreamDestroy(to_stream(stream)));
}

void synchronize_stream(StreamHandle stream, int device) {
  const DeviceGuard guard(device);
  ZSSEG_CUDA_CHECK(cudaStreamSynchronize(to_stream(stream)));
}

std::uintptr_t create_event(int device, EventKind kind) {
  expect_device("device", device);
  const DeviceGuard guard(device);
  cudaEvent_t event = nullptr;
  const unsigned flags = (kind.timing ? cudaEventDefault : cudaEventDisableTiming) |
                         (kind.blocking ? cudaEventBlockingSync : cudaEventDefault);
  ZSSEG_CUDA_CHECK(cudaEventCreateWithFlags(&event, flags));
  return reinterpret_cast<std::uintptr_t>(event);
}

void destroy_event(std::uintptr_t event, int device) noexcept {
  static_cast<void>(device);
  static_cast<void>(cudaEventDestroy(to_event(event)));
}

void record_event(std::uintptr_t event, StreamHandle stream, int device, bool external) {
  const DeviceGuard guard(device);
  if (external && is_captured(stream, device)) {
    ZSSEG_CUDA_CHECK(
        cudaEventRecordWithFlags(to_event(event), to_stream(stream), cudaEventRecordExternal));
  } else {
    ZSSEG_CUDA_CHECK(cudaEventRecord(to_event(event), to_stream(stream)));
  }
}

void wait_event(StreamHandle stream, std::uintptr_t event, int device) {
  const DeviceGuard guard(device);
  ZSSEG_CUDA_CHECK(cudaStreamWaitEvent(to_stream(stream), to_event(event), 0));
}

void synchronize_event(std::uintptr_t event, int device) {
  const DeviceGuard guard(device);
  ZSSEG_CUDA_CHECK(cudaEventSynchronize(to_event(event)));
}

float elapsed_ms(std::uintptr_t start, std::uintptr_t stop) {
  float milliseconds = 0.0f;
  ZSSEG_CUDA_CHECK(cudaEventElapsedTime(&milliseconds, to_event(start), to_event(stop)));
  return milliseconds;
}

}  // namespace zsseg::cuda
