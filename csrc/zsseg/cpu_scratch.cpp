#include "zsseg/cpu_scratch.h"

#include <memory>
#include <new>

namespace zsseg {
namespace {

constexpr std::align_val_t kAlignment{64};

struct Release {
  void operator()(float* memory) const { ::operator delete(memory, kAlignment); }
};

struct Scratch {
  std::unique_ptr<float, Release> memory;
  std::size_t count = 0;
};

}  // namespace

float* cpu_scratch(std::size_t count) {
  thread_local Scratch own;
  if (own.count < count || own.memory == nullptr) {
    own.memory.reset();
    own.count = 0;
    own.memory.reset(static_cast<float*>(::operator new(count * sizeof(float), kAlignment)));
    own.count = count;
  }
  return own.memory.get();
}

}  // namespace zsseg
