#include "bindings/host_workspace.h"

#include <memory>
#include <new>

namespace zsseg::bindings {
namespace {

struct CacheLineDeleter {
  void operator()(char* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};

}  // namespace

TensorView host_workspace(std::size_t bytes) {
  thread_local std::unique_ptr<char, CacheLineDeleter> memory;
  thread_local std::size_t capacity = 0;
  if (bytes > capacity) {
    memory.reset();
    capacity = 0;
    memory.reset(static_cast<char*>(::operator new(bytes, std::align_val_t{64})));
    capacity = bytes;
  }
  return {memory.get(), DType::uint8, {static_cast<std::int64_t>(capacity)}, Device{}};
}

}  // namespace zsseg::bindings
