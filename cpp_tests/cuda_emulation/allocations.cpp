// Allocation and copies.
#include <cstring>
#include <vector>

#include "memory.h"
#include "runtime.h"

namespace cuda_emulation {
namespace {

bool are_on(cudaMemcpyKind kind, const void* to, const void* from) {
  return is_allocated(to) == (kind != cudaMemcpyDeviceToHost) &&
         is_allocated(from) == (kind != cudaMemcpyHostToDevice);
}

void free_now(void* pointer) {
  if (!release(pointer)) {
    fault(cudaErrorIllegalAddress, "freed twice, or written outside its bounds");
  }
}

cudaError_t allocate_now(void** pointer, std::size_t bytes) {
  *pointer = allocate(bytes);
  runtime().counts.allocations += *pointer != nullptr ? 1 : 0;
  return report(*pointer != nullptr ? cudaSuccess : cudaErrorMemoryAllocation);
}

// A node that fills the graph's own memory, at an address that is known now, with what nobody
// wrote.
cudaError_t allocate_in_graph(void** pointer, std::size_t bytes, Stream& stream) {
  *pointer = allocate(bytes);
  if (*pointer == nullptr) {
    return report(cudaErrorMemoryAllocation);
  }
  stream.capture->memory->allocated.insert(*pointer);
  return enqueue(stream, [made = *pointer] { fill_with_poison(made); }, &Counts::allocations);
}

cudaError_t free_in_graph(void* pointer, Stream& stream) {
  if (stream.capture->memory->allocated.count(pointer) == 0) {
    return refuse(*stream.capture, cudaErrorInvalidValue);
  }
  return enqueue(stream, [pointer] { fill_with_poison(pointer); }, &Counts::frees);
}

// Host memory that is not pinned is read during the call, and written before it returns.
cudaError_t copy_pageable(Stream& stream, void* to, const void* from, std::size_t bytes,
                          cudaMemcpyKind kind) {
  if (stream.capture != nullptr) {
    return refuse(*stream.capture, cudaErrorStreamCaptureUnsupported);
  }
  if (kind == cudaMemcpyHostToDevice) {
    const auto* first = static_cast<const char*>(from);
    return enqueue(
        stream,
        [to, staged = std::vector<char>(first, first + bytes)] {
          copy(to, staged.data(), staged.size());
        },
        &Counts::copies_to_device);
  }
  const cudaError_t status =
      enqueue(stream, [=] { copy(to, from, bytes); }, &Counts::copies_to_host);
  if (status == cudaSuccess) {
    ++runtime().counts.host_waits;
    run_until(stream, stream.enqueued);
  }
  return status;
}

}  // namespace

void copy(void* to, const void* from, std::size_t bytes) {
  const DeviceAccess access;
  std::memcpy(to, from, bytes);
}

}  // namespace cuda_emulation

using namespace cuda_emulation;

cudaError_t cudaMalloc(void** pointer, std::size_t bytes) {
  const Lock lock(runtime().mutex);
  const cudaError_t refused = refuse_unsafe_call();
  return refused != cudaSuccess ? refused : allocate_now(pointer, bytes);
}

cudaError_t cudaMallocAsync(void** pointer, std::size_t bytes, cudaStream_t handle) {
  const Lock lock(runtime().mutex);
  const std::shared_ptr<Stream> stream = find(handle);
  if (stream == nullptr) {
    return report(cudaErrorInvalidResourceHandle);
  }
  return stream->capture != nullptr ? allocate_in_graph(pointer, bytes, *stream)
                                    : allocate_now(pointer, bytes);
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
  if (const cudaError_t refused = refuse_unsafe_call(); refused != cudaSuccess) {
    return refused;
  }
  run_all();
  ++runtime().counts.frees;
  ++runtime().counts.host_waits;
  if (pointer != nullptr) {
    free_now(pointer);
  }
  return report(runtime().sticky);
}

cudaError_t cudaFreeAsync(void* pointer, cudaStream_t handle) {
  const Lock lock(runtime().mutex);
  const std::shared_ptr<Stream> stream = find(handle);
  if (stream == nullptr) {
    return report(cudaErrorInvalidResourceHandle);
  }
  return stream->capture != nullptr
             ? free_in_graph(pointer, *stream)
             : enqueue(*stream, [pointer] { free_now(pointer); }, &Counts::frees);
}

cudaError_t cudaHostAlloc(void** pointer, std::size_t bytes, unsigned flags) {
  const Lock lock(runtime().mutex);
  if (const cudaError_t refused = refuse_unsafe_call(); refused != cudaSuccess) {
    return refused;
  }
  if ((flags & ~(cudaHostAllocPortable | cudaHostAllocMapped)) != 0) {
    return report(cudaErrorInvalidValue);
  }
  *pointer = allocate_pinned(bytes);
  runtime().counts.pinned_allocations += *pointer != nullptr ? 1 : 0;
  return report(*pointer != nullptr ? cudaSuccess : cudaErrorMemoryAllocation);
}

// Waits for nothing: work that still uses the memory crashes.
cudaError_t cudaFreeHost(void* pointer) {
  const Lock lock(runtime().mutex);
  if (const cudaError_t refused = refuse_unsafe_call(); refused != cudaSuccess) {
    return refused;
  }
  ++runtime().counts.pinned_frees;
  return report(release_pinned(pointer) ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned flags) {
  const Lock lock(runtime().mutex);
  *device = flags == 0 ? mapped_address(host) : nullptr;
  return report(*device != nullptr ? cudaSuccess : cudaErrorInvalidValue);
}

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
  if (kind == cudaMemcpyDeviceToDevice) {
    return enqueue(*stream, [=] { copy(to, from, bytes); }, &Counts::copies_on_device);
  }
  if (!is_pinned(kind == cudaMemcpyHostToDevice ? from : to)) {
    return copy_pageable(*stream, to, from, bytes, kind);
  }
  return enqueue(
      *stream, [=] { copy(to, from, bytes); },
      kind == cudaMemcpyHostToDevice ? &Counts::copies_to_device : &Counts::copies_to_host);
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  const Lock lock(runtime().mutex);
  const cudaMemoryType type = is_allocated(pointer) ? cudaMemoryTypeDevice
                              : is_pinned(pointer)  ? cudaMemoryTypeHost
                                                    : cudaMemoryTypeUnregistered;
  *attributes = {type, type == cudaMemoryTypeUnregistered ? -2 : 0};
  return cudaSuccess;
}
