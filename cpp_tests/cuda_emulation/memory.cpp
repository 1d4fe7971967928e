#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

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

struct Pinned {
  std::size_t bytes;
  char* mapped;
};

struct Arena {
  char* next = nullptr;
  char* end = nullptr;
  std::map<const char*, Allocation> allocations;  // by data
  std::map<const char*, Pinned> pinned;           // by the host's address
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

bool is_mapped(const Arena& own, const Allocation& allocation) {
  return std::any_of(own.pinned.begin(), own.pinned.end(), [&allocation](const auto& entry) {
    return entry.second.mapped == allocation.data;
  });
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

std::size_t whole_pages(std::size_t bytes) {
  return (std::max<std::size_t>(bytes, 1) + kPage - 1) / kPage * kPage;
}

bool has_room(Arena& own, std::size_t page_bytes) {
  return (own.next != nullptr || reserve(own)) &&
         page_bytes + kPage <= static_cast<std::size_t>(own.end - own.next);
}

// The same new pages for the host and, at `next` of the arena, for the device.
char* map_twice(const Arena& own, std::size_t page_bytes) {
  const int file = memfd_create("cuda_emulation_pinned", 0);
  if (file < 0) {
    return nullptr;
  }
  void* host = MAP_FAILED;
  if (ftruncate(file, static_cast<off_t>(page_bytes)) == 0 &&
      mmap(own.next, page_bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, file, 0) != MAP_FAILED) {
    host = mmap(nullptr, page_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  }
  close(file);
  return host == MAP_FAILED ? nullptr : static_cast<char*>(host);
}

}  // namespace

void* allocate(std::size_t bytes) {
  Arena& own = arena();
  const std::size_t page_bytes = whole_pages(bytes);
  if (!has_room(own, page_bytes)) {
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
  if (found == own.allocations.end() || is_mapped(own, found->second)) {
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
  for (const auto& entry : own.pinned) {
    mprotect(const_cast<char*>(entry.first), whole_pages(entry.second.bytes), PROT_NONE);
  }
  own.pinned.clear();
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

void fill_with_poison(void* pointer) {
  const DeviceAccess access;
  const auto found = arena().allocations.find(static_cast<char*>(pointer));
  if (found != arena().allocations.end()) {
    std::memset(found->second.data, kPoison, found->second.bytes);
  }
}

void* allocate_pinned(std::size_t bytes) {
  Arena& own = arena();
  const std::size_t page_bytes = whole_pages(bytes);
  char* host = has_room(own, page_bytes) ? map_twice(own, page_bytes) : nullptr;
  if (host == nullptr) {
    return nullptr;
  }
  std::memset(host, kPoison, page_bytes);
  const Allocation mapped = {own.next, page_bytes, own.next, bytes};
  own.next += page_bytes + kPage;
  own.allocations[mapped.data] = mapped;
  own.pinned[host] = {bytes, mapped.data};
  if (own.users != 0) {
    protect(mapped, PROT_READ | PROT_WRITE);
  }
  return host;
}

// Both addresses stay reserved, so that later uses crash.
bool release_pinned(void* pointer) {
  Arena& own = arena();
  const auto found = own.pinned.find(static_cast<char*>(pointer));
  if (found == own.pinned.end()) {
    return false;
  }
  mprotect(pointer, whole_pages(found->second.bytes), PROT_NONE);
  const auto mapped = own.allocations.find(found->second.mapped);
  discard(mapped->second);
  own.allocations.erase(mapped);
  own.pinned.erase(found);
  return true;
}

bool is_pinned(const void* pointer) {
  const Arena& own = arena();
  const auto* address = static_cast<const char*>(pointer);
  const auto after = own.pinned.upper_bound(address);
  return after != own.pinned.begin() &&
         address < std::prev(after)->first + std::prev(after)->second.bytes;
}

void* mapped_address(void* pinned) {
  const auto found = arena().pinned.find(static_cast<char*>(pinned));
  return found == arena().pinned.end() ? nullptr : found->second.mapped;
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
