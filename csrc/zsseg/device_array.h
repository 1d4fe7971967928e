// An array in CUDA memory that owns its memory.
#pragma once

#include <memory>

#include "zsseg/pinned_block.h"
#include "zsseg/tensor_view.h"

namespace zsseg {

// A non-blocking CUDA stream; destroyed with its last owner.
class OwnedStream {
 public:
  // Owners are shared: an array keeps the stream it will be freed on.
  static std::shared_ptr<OwnedStream> create(int device);
  // The owner of a handle made by create() and still alive, else null.
  static std::shared_ptr<OwnedStream> find(StreamHandle handle);

  ~OwnedStream();
  OwnedStream(const OwnedStream&) = delete;
  OwnedStream& operator=(const OwnedStream&) = delete;

  StreamHandle handle() const { return handle_; }
  int device() const { return device_; }

 private:
  OwnedStream(StreamHandle handle, int device) : handle_(handle), device_(device) {}

  StreamHandle handle_;
  int device_;
};

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

  // Tells which stream the array was last used on.
  void used_on(StreamHandle stream) const;
  StreamHandle last_stream() const;

 private:
  struct Memory;
  DeviceArray(std::shared_ptr<Memory> memory, const TensorView& view)
      : memory_(std::move(memory)), view_(view) {}

  std::shared_ptr<Memory> memory_;
  TensorView view_;
};

}  // namespace zsseg
