// The part of CUDA that this project uses, executed on the CPU: kernels are compiled as C++ against
// this header and run thread by thread. It stands in for <cuda_runtime.h> in builds with
// ZSSEG_CUDA=EMULATED, which exist so that every kernel is run where there is no GPU. It is not for
// speed, and stricter than a GPU: see README.md beside this file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <type_traits>

#define CUDART_VERSION 13000

// ---- host API ----------------------------------------------------------------------------------
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorIllegalState = 401,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchFailure = 719,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901,
  cudaErrorStreamCaptureMerge = 902,
  cudaErrorStreamCaptureUnmatched = 903,
  cudaErrorStreamCaptureUnjoined = 904,
  cudaErrorStreamCaptureIsolation = 905,
  cudaErrorStreamCaptureImplicit = 906,
  cudaErrorCapturedEvent = 907,
  cudaErrorStreamCaptureWrongThread = 908,
};

enum cudaMemcpyKind {
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice
};
enum cudaMemoryType {
  cudaMemoryTypeUnregistered,
  cudaMemoryTypeHost,
  cudaMemoryTypeDevice,
  cudaMemoryTypeManaged
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrIntegrated = 18,
  cudaDevAttrMemoryPoolsSupported = 115
};
constexpr unsigned cudaStreamNonBlocking = 1;
constexpr unsigned cudaEventDefault = 0;
constexpr unsigned cudaEventBlockingSync = 1;
constexpr unsigned cudaEventDisableTiming = 2;
constexpr unsigned cudaEventRecordDefault = 0;
constexpr unsigned cudaEventRecordExternal = 1;
constexpr unsigned cudaHostAllocPortable = 1;
constexpr unsigned cudaHostAllocMapped = 2;
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};
enum cudaStreamCaptureStatus {
  cudaStreamCaptureStatusNone,
  cudaStreamCaptureStatusActive,
  cudaStreamCaptureStatusInvalidated
};

using cudaStream_t = struct EmulatedStreamHandle*;
using cudaEvent_t = struct EmulatedEventHandle*;
using cudaMemPool_t = struct EmulatedMemPool*;
using cudaGraph_t = struct EmulatedGraphHandle*;
using cudaGraphExec_t = struct EmulatedGraphExecHandle*;
using cudaGraphNode_t = struct EmulatedGraphNode*;

struct cudaDeviceProp {
  char name[256];
  int major, minor;
  std::size_t totalGlobalMem;
  int multiProcessorCount;
};

enum cudaMemAllocationType { cudaMemAllocationTypePinned = 1 };
enum cudaMemLocationType { cudaMemLocationTypeDevice = 1 };
enum cudaMemPoolAttr { cudaMemPoolAttrReleaseThreshold = 4 };
struct cudaMemLocation {
  cudaMemLocationType type;
  int id;
};
struct cudaMemPoolProps {
  cudaMemAllocationType allocType;
  cudaMemLocation location;
};

struct cudaPointerAttributes {
  cudaMemoryType type;
  int device;
};

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned in_x = 1, unsigned in_y = 1, unsigned in_z = 1)
      : x(in_x), y(in_y), z(in_z) {}
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaDriverGetVersion(int* version);
enum cudaDriverEntryPointQueryResult {
  cudaDriverEntryPointSuccess,
  cudaDriverEntryPointSymbolNotFound
};
constexpr unsigned long long cudaEnableDefault = 0;
// Knows cuDevicePrimaryCtxGetState.
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                             unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* result);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDeviceReset();
cudaError_t cudaMalloc(void** pointer, std::size_t bytes);
cudaError_t cudaMallocAsync(void** pointer, std::size_t bytes, cudaStream_t stream);
cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps* properties);
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, cudaMemPoolAttr attribute, void* value);
cudaError_t cudaMallocFromPoolAsync(void** pointer, std::size_t bytes, cudaMemPool_t pool,
                                    cudaStream_t stream);
cudaError_t cudaFree(void* pointer);
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t stream);
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaHostAlloc(void** pointer, std::size_t bytes, unsigned flags);
cudaError_t cudaFreeHost(void* pointer);
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned flags);
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t stop);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, std::size_t* count);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph,
                                 unsigned long long flags);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);

namespace cuda_emulation {

// Enqueues one launch of the kernel at an address; `thread` is what each of its threads does.
cudaError_t enqueue_launch(const cudaLaunchConfig_t& config, const void* kernel,
                           std::function<void()> thread);

// Calls that were accepted since the program began. Recording one into a graph is none, but the
// launch of a graph is one for each that it holds. All std::uint64_t, as tests read them by
// cuda_emulation_counts.
struct Counts {
  std::uint64_t launches;
  std::uint64_t kernels;  // different ones, each instance of a template by itself
  std::uint64_t allocations;
  std::uint64_t kept_allocations;  // of them, from a pool that keeps some freed memory
  std::uint64_t frees;
  std::uint64_t copies_to_device;
  std::uint64_t copies_to_host;
  std::uint64_t copies_on_device;
  std::uint64_t events_made;
  std::uint64_t events_recorded;
  std::uint64_t stream_waits;  // a stream waits for another's event
  std::uint64_t host_waits;    // the caller waits: for a stream, an event, a pageable copy to it
  std::uint64_t graph_launches;
  std::uint64_t pinned_allocations;
  std::uint64_t pinned_frees;
};
Counts counts();

// How many multiprocessors the device says it has, 1 at first; also exported, as
// cuda_emulation_set_multiprocessors.
void set_multiprocessors(int count);

// How many devices there are, 1 at first. All of them share memory and streams: only which one is
// current differs, and which have a context. Back to 1 by cudaDeviceReset.
void set_device_count(int count);
bool has_context(int device);

// Whether a kernel may follow this pointer. Other kinds of parameters pass.
bool is_device_address(const void* pointer);
template <typename T>
bool is_fit_parameter(const T& value) {
  if constexpr (std::is_pointer_v<T>) {
    return value == nullptr || is_device_address(value);
  } else {
    return true;
  }
}

}  // namespace cuda_emulation

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...),
                "copied to the GPU byte by byte");
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "CUDA passes 4 KiB of parameters");
  return [&](Parameters... copies) {
    if (!(cuda_emulation::is_fit_parameter(copies) && ...)) {
      return cudaErrorIllegalAddress;
    }
    return cuda_emulation::enqueue_launch(*config, reinterpret_cast<const void*>(kernel),
                                          [=] { kernel(copies...); });
  }(static_cast<Arguments&&>(arguments)...);
}

// ---- the language inside kernels ---------------------------------------------------------------
#define __host__
#define __device__
#define __global__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
// One block runs at a time, so its shared memory is the program's; the section, and for templates
// the symbol, lets it be poisoned.
#define __shared__ static __attribute__((section("cuda_emulation_shared")))

// Of the thread that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace cuda_emulation {

void barrier(const char* file, int line);
// Hands `value` to the other lanes named in `mask` and returns what lane `from` gave.
std::uint64_t exchange(unsigned mask, std::uint64_t value, int from, const char* file, int line);
unsigned ballot(unsigned mask, bool vote, const char* file, int line);
// Hands `value` to all lanes of the warp and returns what each of them gave, valid until the next
// call.
const std::uint64_t* exchange_all(std::uint64_t value, const char* file, int line);
int lane();
void* dynamic_shared_memory();

// cp.async: copies 16 bytes to shared memory, zeros from null, at once or, by chance, not before
// the thread waits for them, as both happen on a GPU.
void copy_later(void* to, const void* from, const char* file, int line);
void end_copy_group();
void wait_for_copies(std::size_t groups_left);
// A fault unless the address is a multiple of `bytes`.
void check_alignment(const void* address, std::size_t bytes, const char* file, int line);

}  // namespace cuda_emulation

#define __syncthreads() ::cuda_emulation::barrier(__FILE__, __LINE__)

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(std::uint64_t));
  std::uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  bits = cuda_emulation::exchange(mask, bits, cuda_emulation::lane() ^ lanes, file, line);
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned __ballot_sync(unsigned mask, bool vote, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
  return cuda_emulation::ballot(mask, vote, file, line);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  cuda_emulation::ballot(mask, false, file, line);
}

inline void __threadfence() {}  // one thread runs at a time
inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
inline int min(int a, int b) {
  return a < b ? a : b;
}
inline int max(int a, int b) {
  return a > b ? a : b;
}
// One thread runs at a time; __atomic_ shows who looks for races that these accesses are none.
inline int atomicAdd(int* at, int value) {
  const int before = __atomic_load_n(at, __ATOMIC_RELAXED);
  __atomic_store_n(at, before + value, __ATOMIC_RELAXED);
  return before;
}
inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long value) {
  const unsigned long long before = __atomic_load_n(at, __ATOMIC_RELAXED);
  __atomic_store_n(at, before + value, __ATOMIC_RELAXED);
  return before;
}
inline int atomicMin(int* at, int value) {
  const int before = __atomic_load_n(at, __ATOMIC_RELAXED);
  __atomic_store_n(at, min(before, value), __ATOMIC_RELAXED);
  return before;
}
inline int atomicMax(int* at, int value) {
  const int before = __atomic_load_n(at, __ATOMIC_RELAXED);
  __atomic_store_n(at, max(before, value), __ATOMIC_RELAXED);
  return before;
}
