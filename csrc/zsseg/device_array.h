// An array in CUDA memory that owns its memory.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>

#include "zsseg/pinned_block.h"
#include "zsseg/tensor_view.h"

namespace zsseg {

// A non-blocking CUDA stream; destroyed with its last owner. It numbers the uses of arrays, which
// so know whether what used them has been waited for.
class OwnedStream {
 public:
  // Owners are shared: an array keeps the stream it will be freed on. Who waits for it sleeps, or
  // keeps a CPU busy, which sees the end sooner; by default it sleeps where GPU and CPU share
  // power.
  static std::shared_ptr<OwnedStream> create(int device, std::optional<bool> sleeps = {});
  // The owner of a handle made by create() and still alive, else null.
  static std::shared_ptr<OwnedStream> find(StreamHandle handle);

  void synchronize();
  // Whether what is enqueued now runs when a recording is launched.
  void set_recording(bool is_recording) { is_recording_ = is_recording; }
  bool is_recording() const { return is_recording_; }

  std::uint64_t uses() const { return uses_; }
  std::uint64_t count_use() { return ++uses_; }  // once it is enqueued
  bool has_finished(std::uint64_t use) const { return use <= finished_; }

  ~OwnedStream();
  OwnedStream(const OwnedStream&) = delete;
  OwnedStream& operator=(const OwnedStream&) = delete;

  StreamHandle handle() const { return handle_; }
  int device() const { return device_; }

 private:
  OwnedStream(StreamHandle handle, int device, std::uintptr_t end)
      : handle_(handle), device_(device), end_(end) {}

  StreamHandle handle_;
  int device_;
  std::uintptr_t end_;  // an event for waits that sleep, or 0
  std::atomic<std::uint64_t> uses_{0}, finished_{0};
  std::atomic<bool> is_recording_{false};
};

// Waits for a stream, of ours or another's.
void synchronize(StreamHandle stream, int device);

// Cheap to copy: copies and views share the memory. It is freed, when the last of them goes, on the
// stream that last used any of them. A stream not made by OwnedStream must outlive the array.
class DeviceArray {
 public:
  // Uninitialised memory, usable on `stream` at once.
  static DeviceArray empty(const Shape& shape, DType dtype, int device, StreamHandle stream);

  // Pinned memory as the GPU sees it; the block lives as long as the array.
  static DeviceArray over(std::shared_ptr<PinnedBlock> block, const Shape& shape, DType dtype,
                          StreamHandle stream);

  // The elements from number `first` on, as another shape of no more elements; throws ShapeError.
  DeviceArray viewed_as(const Shape& shape, std::int64_t first = 0) const;

  const TensorView& view() const { return view_; }

  // Before something is enqueued that uses the array: `stream` waits for its last use, unless that
  // is over. Throws CaptureError where the one is recorded and the other is not.
  void use_on(StreamHandle stream) const;
  // After that was enqueued.
  void used() const;
  // Makes what another library enqueues on its stream from now on wait for the array's last use.
  void lend_to(StreamHandle other) const;
  // Makes the next use, and the release, wait for what another library's stream holds now.
  void wait_for(StreamHandle other) const noexcept;
  StreamHandle last_stream() const;

 private:
  struct Memory;
  DeviceArray(std::shared_ptr<Memory> memory, const TensorView& view)
      : memory_(std::move(memory)), view_(view) {}

  std::shared_ptr<Memory> memory_;
  TensorView view_;
};

}  // namespace zsseg
