// Neighbouring elements that a thread of a kernel loads or stores at once.
#pragma once

#include <cstddef>
#include <cstdint>

namespace zsseg {

template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) Wide {
  T value[kCount];
};

// Whether an array may be read or written in such pieces of `bytes`, a power of 2; null may.
inline bool is_aligned(const void* pointer, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

}  // namespace zsseg
