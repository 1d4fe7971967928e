#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <map>

namespace cuda_emulation {
namespace {

constexpr std::size_t kArenaBytes = std::size_t{64} << 30;  // of addresses, not of memory
constexpr std::size_t kPage = 4096;
constexpr std::size_t kAlignment = 256;  // as CUDA's
constexpr int kPoison = 0xff;            // NaN as a float

struct Allocation {
  char* pages;
  std::size_t page_bytes;
  char* data;
  std::size_t bytes;
};

struct Arena {
  char* next = nullptr;
  char* end = nullptr;
  std::map<const char*, Allocation> allocations;  // by data
  int users = 0;
};

Arena& arena() {
  static auto* const only = new Arena;
  return *only;
}

void protect(const Allocation& allocation, int protection) {
  mprotect(allocation.pages, allocation.page_bytes, protection);
}

bool reserve(Arena& own) {
  void* start =
      mmap(nullptr, kArenaBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) {
    return false;
  }
  own.next = static_cast<char*>(start);
  own.end = own.next + kArenaBytes;
  return true;
}

bool is_intact(const Allocation& allocation) {
  const auto is_poison = [](char byte) { return byte == static_cast<char>(kPoison); };
  return std::all_of(allocation.pages, allocation.data, is_poison) &&
         std::all_of(allocation.data + allocation.bytes, allocation.pages + allocation.page_bytes,
                     is_poison);
}

void discard(const Allocation& allocation) {
  madvise(allocation.pages, allocation.page_bytes, MADV_DONTNEED);
  protect(allocation, PROT_NONE);
}

}  // namespace

void* allocate(std::size_t bytes) {
  Arena& own = arena();
  if (own.next == nullptr && !reserve(own)) {
    return nullptr;
  }
  const std::size_t page_bytes = (std::max<std::size_t>(bytes, 1) + kPage - 1) / kPage * kPage;
  if (page_bytes + kPage > static_cast<std::size_t>(own.end - own.next)) {
    return nullptr;
  }
  const std::size_t aligned = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  Allocation made = {own.next, page_bytes, own.next + page_bytes - aligned, bytes};
  own.next += page_bytes + kPage;
  protect(made, PROT_READ | PROT_WRITE);
  std::memset(made.pages, kPoison, page_bytes);
  if (own.users == 0) {
    protect(made, PROT_NONE);
  }
  own.allocations[made.data] = made;
  return made.data;
}

bool release(void* pointer) {
  Arena& own = arena();
  const auto found = own.allocations.find(static_cast<char*>(pointer));
  if (found == own.allocations.end()) {
    return false;
  }
  const DeviceAccess access;
  const bool intact = is_intact(found->second);
  discard(found->second);
  own.allocations.erase(found);
  return intact;
}

void release_all() {
  Arena& own = arena();
  for (const auto& entry : own.allocations) {
    discard(entry.second);
  }
  own.allocations.clear();
}

bool is_allocated(const void* pointer) {
  const Arena& own = arena();
  const auto* address = static_cast<const char*>(pointer);
  auto after = own.allocations.upper_bound(address);
  if (after == own.allocations.begin()) {
    return false;
  }
  const Allocation& before = std::prev(after)->second;
  return address < before.data + std::max<std::size_t>(before.bytes, 1);
}

DeviceAccess::DeviceAccess() {
  Arena& own = arena();
  if (own.users++ == 0) {
    for (const auto& entry : own.allocations) {
      protect(entry.second, PROT_READ | PROT_WRITE);
    }
  }
}

DeviceAccess::~DeviceAccess() {
  Arena& own = arena();
  if (--own.users == 0) {
    for (const auto& entry : own.allocations) {
      protect(entry.second, PROT_NONE);
    }
  }
}

}  // namespace cuda_emulation
