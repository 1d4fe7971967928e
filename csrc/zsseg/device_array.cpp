#include "zsseg/device_array.h"

#include <algorithm>
#include <map>
#include <mutex>

#include "zsseg/check.h"
#include "zsseg/cuda_capture.h"
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

std::shared_ptr<OwnedStream> OwnedStream::create(int device, std::optional<bool> sleeps) {
  const bool does = sleeps ? *sleeps : cuda::device_properties(device).integrated;
  const std::uintptr_t end = does ? cuda::create_event(device, {false, true}) : 0;
  std::shared_ptr<OwnedStream> stream(new OwnedStream(cuda::create_stream(device), device, end));
  const std::lock_guard<std::mutex> lock(registry().mutex);
  registry().streams[stream->handle()] = stream;
  return stream;
}

std::shared_ptr<OwnedStream> OwnedStream::find(StreamHandle handle) {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  const auto entry = registry().streams.find(handle);
  return entry == registry().streams.end() ? nullptr : entry->second.lock();
}

OwnedStream::~OwnedStream() {
  {
    const std::lock_guard<std::mutex> lock(registry().mutex);
    registry().streams.erase(handle_);
  }
  cuda::destroy_stream(handle_, device_);
  if (end_ != 0) {
    cuda::destroy_event(end_, device_);
  }
}

void OwnedStream::synchronize() {
  const std::uint64_t use = uses_;  // before the wait: what another thread enqueues is not meant
  if (end_ == 0) {
    cuda::synchronize_stream(handle_, device_);
  } else {
    cuda::record_event(end_, handle_, device_);
    cuda::synchronize_event(end_, device_);
  }
  std::uint64_t before = finished_;
  while (before < use && !finished_.compare_exchange_weak(before, use)) {
  }
}

void synchronize(StreamHandle stream, int device) {
  const std::shared_ptr<OwnedStream> owner = OwnedStream::find(stream);
  owner == nullptr ? cuda::synchronize_stream(stream, device) : owner->synchronize();
}

struct DeviceArray::Memory {
  // Where the array was last used. Of a stream of ours, `number` is the use's, or kUnderWay.
  struct Use {
    StreamHandle stream;
    std::shared_ptr<OwnedStream> owner;
    std::uint64_t number;
    bool is_recorded = false;  // each launch uses it again
  };
  static constexpr std::uint64_t kUnderWay = UINT64_MAX;

  void* pointer;
  std::size_t bytes;
  int device;
  std::mutex mutex;  // guards `last`; nothing else is locked under it
  Use last;
  std::shared_ptr<PinnedBlock> block;  // whose memory it is, else the array's own

  Memory(void* allocated, std::size_t size, int index, StreamHandle on)
      : pointer(allocated), bytes(size), device(index), last{on, OwnedStream::find(on), kUnderWay} {
    count_use();
  }
  ~Memory() {
    if (block == nullptr) {
      cuda::release(pointer, device, last.stream, last.owner);
    }
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void count_use() {
    if (last.owner != nullptr) {
      last.number = last.owner->count_use();
      last.is_recorded = last.is_recorded || last.owner->is_recording();
    }
  }
  Use last_use() {
    const std::lock_guard<std::mutex> lock(mutex);
    return last;
  }
  // `later` waits for the last use, unless that is over.
  void order_before(StreamHandle later) {
    const Use use = last_use();
    const std::uint64_t number =
        use.owner != nullptr && use.is_recorded ? use.owner->uses() : use.number;
    if (use.owner == nullptr || !use.owner->has_finished(number)) {
      cuda::order_streams(use.stream, later, device);
    }
  }
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

void DeviceArray::use_on(StreamHandle stream) const {
  memory_->order_before(stream);
  const std::lock_guard<std::mutex> lock(memory_->mutex);
  Memory::Use& last = memory_->last;
  if (last.stream != stream) {
    last = {stream, OwnedStream::find(stream), Memory::kUnderWay};
  }
  last.number = Memory::kUnderWay;
}

void DeviceArray::used() const {
  const std::lock_guard<std::mutex> lock(memory_->mutex);
  memory_->count_use();
}

void DeviceArray::lend_to(StreamHandle other) const {
  memory_->order_before(other);
}

void DeviceArray::wait_for(StreamHandle other) const noexcept {
  const StreamHandle stream = last_stream();
  const int device = memory_->device;
  cuda::run_outside_captures(stream, device, false, [array = *this, other, stream, device] {
    cuda::order_streams(other, stream, device);
    array.used();
  });
}

StreamHandle DeviceArray::last_stream() const {
  return memory_->last_use().stream;
}

}  // namespace zsseg
