// The part of the CUDA runtime this project needs, callable without CUDA headers. In a build
// without CUDA, device_count() is 0 and everything else throws DeviceError.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "zsseg/tensor_view.h"

namespace zsseg::cuda {

bool is_built();
int runtime_version();  // 13000 = 13.0; 0 when not built
int device_count();     // 0 without a usable driver

struct DeviceProperties {
  std::string name;
  int major = 0;
  int minor = 0;
  std::size_t total_memory = 0;  // bytes
  int multiprocessors = 0;
  int driver = 0;           // newest CUDA it serves: 13000 = 13.0
  bool integrated = false;  // shares the host's memory, as Jetsons do
};
DeviceProperties device_properties(int device);

// Makes `device` the calling thread's current one; returns the previous one. `only_active`: does so
// only where this process has a context on it.
int set_current_device(int device, bool only_active = false);

// Throws DeviceError unless this computer has CUDA device `device`.
void expect_device(const char* name, int device);

// The device a pointer lives on; cpu for memory CUDA does not know.
Device device_of(const void* pointer);

void* allocate(std::size_t bytes, int device, StreamHandle stream);
// Once the stream gets there; `owner` keeps the stream until then. On a stream that is captured,
// once the capture has ended.
void release(void* pointer, int device, StreamHandle stream,
             std::shared_ptr<const void> owner = nullptr) noexcept;
// Page-locked host memory that every GPU can reach.
void* allocate_pinned(std::size_t bytes, int device);
void release_pinned(void* pointer, int device) noexcept;
void* mapped_address(void* pinned, int device);  // where the GPU sees it
bool is_pinned(const void* pointer, int device);
// Copies from and to pageable memory use it before they return; with pinned memory they may not.
void copy_to_device(void* to, const void* from, std::size_t bytes, int device, StreamHandle stream);
void copy_to_host(void* to, const void* from, std::size_t bytes, int device, StreamHandle stream);
void copy_on_device(void* to, const void* from, std::size_t bytes, int device, StreamHandle stream);

StreamHandle create_stream(int device);  // does not synchronise with the default stream
void destroy_stream(StreamHandle stream, int device) noexcept;
void synchronize_stream(StreamHandle stream, int device);

struct EventKind {
  bool timing = false;
  bool blocking = false;  // who waits for it sleeps, for a little more delay and no CPU time
};
std::uintptr_t create_event(int device, EventKind kind);
void destroy_event(std::uintptr_t event, int device) noexcept;
// `external`: in a capture, an event that each launch reaches anew, and that no stream in the
// capture can wait for.
void record_event(std::uintptr_t event, StreamHandle stream, int device, bool external = false);
void wait_event(StreamHandle stream, std::uintptr_t event, int device);
void synchronize_event(std::uintptr_t event, int device);
float elapsed_ms(std::uintptr_t start, std::uintptr_t stop);

}  // namespace zsseg::cuda
