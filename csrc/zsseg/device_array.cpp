#include "zsseg/device_array.h"

#include <algorithm>
#include <map>
#include <mutex>

#include "zsseg/check.h"
#include "zsseg/cuda_runtime.h"
#include "zsseg/error.h"

namespace zsseg {
namespace {

struct StreamRegistry {
  std::mutex mutex;
  std::map<StreamHandle, std::weak_ptr<OwnedStream>> streams;
};

// Never destroyed: streams may go after static objects have.
StreamRegistry& registry() {
  static auto* const streams = new StreamRegistry;
  return *streams;
}

}  // namespace

std::shared_ptr<OwnedStream> OwnedStream::create(int device) {
  std::shared_ptr<OwnedStream> stream(new OwnedStream(cuda::create_stream(device), device));
  const std::lock_guard<std::mutex> lock(registry().mutex);
  registry().streams[stream->handle()] = stream;
  return stream;
}

std::shared_ptr<OwnedStream> OwnedStream::find(StreamHandle handle) {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  const auto found = registry().streams.find(handle);
  return found == registry().streams.end() ? nullptr : found->second.lock();
}

OwnedStream::~OwnedStream() {
  {
    const std::lock_guard<std::mutex> lock(registry().mutex);
    registry().streams.erase(handle_);
  }
  cuda::destroy_stream(handle_, device_);
}

struct DeviceArray::Memory {
  void* pointer;
  std::size_t bytes;
  int device;
  StreamHandle stream;
  std::shared_ptr<OwnedStream> stream_owner;
  std::mutex mutex;                    // guards the two above
  std::shared_ptr<PinnedBlock> block;  // whose memory it is, else the array's own

  Memory(void* allocated, std::size_t size, int index, StreamHandle on)
      : pointer(allocated),
        bytes(size),
        device(index),
        stream(on),
        stream_owner(OwnedStream::find(on)) {}
  ~Memory() {
    if (block == nullptr) {
      cuda::release(pointer, device, stream, stream_owner);
    }
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
};

DeviceArray DeviceArray::empty(const Shape& shape, DType dtype, int device, StreamHandle stream) {
  TensorView view{nullptr, dtype, shape, Device{DeviceKind::cuda, device}};
  // An empty array owns a byte: every array then has an address on its device.
  const std::size_t bytes = std::max<std::size_t>(view.bytes(), 1);
  view.data = cuda::allocate(bytes, device, stream);
  return DeviceArray(std::make_shared<Memory>(view.data, bytes, device, stream), view);
}

DeviceArray DeviceArray::over(std::shared_ptr<PinnedBlock> block, const Shape& shape, DType dtype,
                              StreamHandle stream) {
  const int device = block->device();
  const TensorView view{block->mapped(), dtype, shape, Device{DeviceKind::cuda, device}};
  auto memory = std::make_shared<Memory>(view.data, block->bytes(), device, stream);
  memory->block = std::move(block);
  return DeviceArray(std::move(memory), view);
}

DeviceArray DeviceArray::viewed_as(const Shape& shape, std::int64_t first) const {
  TensorView view = view_;
  view.shape = shape;
  const std::int64_t count = view_.count();
  if (first < 0 || first > count || shape.count() > count - first) {
    throw ShapeError("shape: expected at most " + std::to_string(count) + " elements, got " +
                     to_string(shape) + " from element " + std::to_string(first) +
                     " on. Allocate a larger array.");
  }
  view.data =
      static_cast<char*>(view.data) + first * static_cast<std::int64_t>(size_of(view.dtype));
  return DeviceArray(memory_, view);
}

void DeviceArray::used_on(StreamHandle stream) const {
  const std::lock_guard<std::mutex> lock(memory_->mutex);
  if (memory_->stream != stream) {
    memory_->stream_owner = OwnedStream::find(stream);
    memory_->stream = stream;
  }
}

StreamHandle DeviceArray::last_stream() const {
  const std::lock_guard<std::mutex> lock(memory_->mutex);
  return memory_->stream;
}

}  // namespace zsseg
