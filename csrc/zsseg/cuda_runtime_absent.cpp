// cuda_runtime.h and cuda_capture.h in a build without CUDA.
#include "zsseg/cuda_capture.h"
#include "zsseg/cuda_runtime.h"
#include "zsseg/error.h"

namespace zsseg::cuda {
namespace {

[[noreturn]] void fail(const char* name) {
  throw DeviceError(std::string(name) +
                    ": expected a build with CUDA, got one without. "
                    "Install zsseg_rt where nvcc is found (ZSSEG_CUDA=ON), or use the CPU.");
}

}  // namespace

bool is_built() {
  return false;
}
int runtime_version() {
  return 0;
}
int device_count() {
  return 0;
}
DeviceProperties device_properties(int) {
  fail("device");
}
int set_current_device(int, bool) {
  fail("device");
}
void expect_device(const char* name, int) {
  fail(name);
}
Device device_of(const void*) {
  fail("device");
}
void* allocate(std::size_t, int, StreamHandle) {
  fail("device");
}
void release(void*, int, StreamHandle, std::shared_ptr<const void>) noexcept {}
void* allocate_pinned(std::size_t, int) {
  fail("device");
}
void release_pinned(void*, int) noexcept {}
void* mapped_address(void*, int) {
  fail("device");
}
bool is_pinned(const void*, int) {
  return false;
}
void copy_to_device(void*, const void*, std::size_t, int, StreamHandle) {
  fail("device");
}
void copy_to_host(void*, const void*, std::size_t, int, StreamHandle) {
  fail("device");
}
void copy_on_device(void*, const void*, std::size_t, int, StreamHandle) {
  fail("device");
}
StreamHandle create_stream(int) {
  fail("device");
}
void destroy_stream(StreamHandle, int) noexcept {}
void synchronize_stream(StreamHandle, int) {
  fail("device");
}
std::uintptr_t create_event(int, EventKind) {
  fail("device");
}
void destroy_event(std::uintptr_t, int) noexcept {}
void record_event(std::uintptr_t, StreamHandle, int, bool) {
  fail("device");
}
void wait_event(StreamHandle, std::uintptr_t, int) {
  fail("device");
}
void synchronize_event(std::uintptr_t, int) {
  fail("device");
}
float elapsed_ms(std::uintptr_t, std::uintptr_t) {
  fail("device");
}
void order_streams(StreamHandle, StreamHandle, int) {
  fail("device");
}
bool is_captured(StreamHandle, int) {
  return false;
}
void begin_capture(StreamHandle, int) {
  fail("device");
}
Recording end_capture(StreamHandle, int) {
  fail("device");
}
void cancel_capture(StreamHandle, int) noexcept {}
void launch_recording(const Recording&, StreamHandle, int) {
  fail("device");
}
void destroy_recording(const Recording&, int) noexcept {}
void run_outside_captures(StreamHandle, int, bool, std::function<void()> task) noexcept {
  task();
}
void run_deferred() noexcept {}

}  // namespace zsseg::cuda
