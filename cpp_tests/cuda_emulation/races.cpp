#include "races.h"

#include <dlfcn.h>
#include <elf.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

namespace cuda_emulation {
namespace {

constexpr int kLanes = 32;

// The threads that did one kind of thing with a byte since the block's last barrier: all warps that
// did, and of the last of them the lanes that did since they last met.
struct Users {
  std::uint64_t barrier = 0;
  std::uint32_t warps = 0;
  int warp = 0;
  std::uint32_t lanes = 0;
  std::uint64_t met = 0;
  const void* code = nullptr;  // that of the last one
};

struct Byte {
  Users reads, writes, atomics;
};

enum class Use { read, write, atomic };

struct Region {
  const char* from;
  const char* to;
  std::vector<Byte> bytes;
};

struct Watch {
  std::vector<Region> regions;
  std::uint64_t barrier = 1;
  std::array<std::uint64_t, kLanes> met = {};  // by warp
  std::string race;
};

Watch& watched() {
  static auto* const only = new Watch;
  return *only;
}

bool holds_another(const Watch& own, const Users& users, int thread) {
  if (users.barrier != own.barrier) {
    return false;
  }
  const int warp = thread / kLanes;
  if ((users.warps & ~(1u << warp)) != 0) {
    return true;
  }
  return users.warp == warp && users.met == own.met[static_cast<std::size_t>(warp)] &&
         (users.lanes & ~(1u << thread % kLanes)) != 0;
}

void add(const Watch& own, Users& users, int thread, const void* code) {
  const int warp = thread / kLanes;
  const std::uint64_t met = own.met[static_cast<std::size_t>(warp)];
  if (users.barrier != own.barrier) {
    users = {own.barrier, 0, warp, 0, met, code};
  }
  if (users.warp != warp || users.met != met) {
    users.warp = warp;
    users.met = met;
    users.lanes = 0;
  }
  users.warps |= 1u << warp;
  users.lanes |= 1u << thread % kLanes;
  users.code = code;
}

// File and line by the symbols of the program; its own name and an offset where there are none.
std::string place_of(const void* code) {
  Dl_info module = {};
  const char* at = static_cast<const char*>(code) - 1;  // within the call
  if (dladdr(at, &module) == 0) {
    return "an unknown place";
  }
  const auto* header = static_cast<const Elf64_Ehdr*>(module.dli_fbase);
  const std::size_t offset =
      header->e_type == ET_DYN
          ? static_cast<std::size_t>(at - static_cast<const char*>(module.dli_fbase))
          : reinterpret_cast<std::size_t>(at);
  char command[4096];
  std::snprintf(command, sizeof command, "addr2line -e '%s' 0x%zx 2>/dev/null", module.dli_fname,
                offset);
  char line[1024] = "";
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command, "r"), pclose);
  if (pipe == nullptr || std::fgets(line, sizeof line, pipe.get()) == nullptr || line[0] == '?') {
    std::snprintf(line, sizeof line, "%s+0x%zx", module.dli_fname, offset);
  }
  const std::string path(line, std::strcspn(line, " \n"));
  return path.substr(path.rfind('/') + 1);
}

const char* name_of(Use use) {
  return use == Use::read ? "read" : use == Use::write ? "written" : "changed by an atomic";
}

void tell(Watch& own, Use before, const Users& users, Use now, const void* code) {
  if (own.race.empty()) {
    own.race = "shared memory is " + std::string(name_of(before)) + " at " + place_of(users.code) +
               " and " + name_of(now) + " by another thread at " + place_of(code) +
               " with no barrier between";
  }
}

void note(Watch& own, Byte& byte, Use use, int thread, const void* code) {
  const std::array<std::pair<Use, Users*>, 3> kinds = {
      {{Use::read, &byte.reads}, {Use::write, &byte.writes}, {Use::atomic, &byte.atomics}}};
  for (const auto& [kind, users] : kinds) {
    const bool harmless = kind == use && use != Use::write;
    if (!harmless && holds_another(own, *users, thread)) {
      tell(own, kind, *users, use, code);
    }
  }
  add(own, *kinds[static_cast<std::size_t>(use)].second, thread, code);
}

}  // namespace

void watch(const char* from, const char* to) {
  std::vector<Region>& regions = watched().regions;
  const bool is_known = std::any_of(regions.begin(), regions.end(), [=](const Region& region) {
    return from >= region.from && to <= region.to;
  });
  if (!is_known) {
    regions.push_back({from, to, std::vector<Byte>(static_cast<std::size_t>(to - from))});
  }
}

void order_block() {
  ++watched().barrier;
}

void order_warp(std::size_t warp) {
  ++watched().met[warp];
}

std::string take_race() {
  return std::exchange(watched().race, {});
}

void touch(const void* address, std::size_t bytes, Use use, const void* code) {
  Watch& own = watched();
  const auto* at = static_cast<const char*>(address);
  for (Region& region : own.regions) {
    if (at < region.from || at >= region.to) {
      continue;
    }
    const int thread = running_thread();
    const auto first = static_cast<std::size_t>(at - region.from);
    for (std::size_t byte = first; thread >= 0 && byte < first + bytes; ++byte) {
      if (byte < region.bytes.size()) {
        note(own, region.bytes[byte], use, thread, code);
      }
    }
  }
}

}  // namespace cuda_emulation

// What the compiler calls before each access to memory.
using cuda_emulation::touch;
using cuda_emulation::Use;
// NOLINTBEGIN: the names are the compiler's.
#define TOUCH(bytes, use) touch(address, bytes, Use::use, __builtin_return_address(0))
#define DEFINE_ACCESS(bytes)                          \
  void __tsan_read##bytes(void* address) {            \
    TOUCH(bytes, read);                               \
  }                                                   \
  void __tsan_write##bytes(void* address) {           \
    TOUCH(bytes, write);                              \
  }                                                   \
  void __tsan_unaligned_read##bytes(void* address) {  \
    TOUCH(bytes, read);                               \
  }                                                   \
  void __tsan_unaligned_write##bytes(void* address) { \
    TOUCH(bytes, write);                              \
  }
#define DEFINE_CHANGE(bits, type, change)                                   \
  type __tsan_atomic##bits##_##change(volatile type* at, type value, int) { \
    auto* address = const_cast<type*>(at);                                  \
    TOUCH(sizeof(type), atomic);                                            \
    return __atomic_##change(at, value, __ATOMIC_SEQ_CST);                  \
  }
#define DEFINE_ATOMIC(bits, type)                                        \
  type __tsan_atomic##bits##_load(const volatile type* at, int) {        \
    auto* address = const_cast<type*>(at);                               \
    TOUCH(sizeof(type), atomic);                                         \
    return __atomic_load_n(at, __ATOMIC_SEQ_CST);                        \
  }                                                                      \
  void __tsan_atomic##bits##_store(volatile type* at, type value, int) { \
    auto* address = const_cast<type*>(at);                               \
    TOUCH(sizeof(type), atomic);                                         \
    __atomic_store_n(at, value, __ATOMIC_SEQ_CST);                       \
  }                                                                      \
  DEFINE_CHANGE(bits, type, fetch_add)                                   \
  DEFINE_CHANGE(bits, type, fetch_sub)                                   \
  DEFINE_CHANGE(bits, type, fetch_or)                                    \
  DEFINE_CHANGE(bits, type, fetch_and)
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
DEFINE_ACCESS(1)
DEFINE_ACCESS(2)
DEFINE_ACCESS(4)
DEFINE_ACCESS(8)
DEFINE_ACCESS(16)
void __tsan_read_range(void* address, std::size_t bytes) {
  TOUCH(bytes, read);
}
void __tsan_write_range(void* address, std::size_t bytes) {
  TOUCH(bytes, write);
}
DEFINE_ATOMIC(8, std::uint8_t)
DEFINE_ATOMIC(32, std::uint32_t)
DEFINE_ATOMIC(64, std::uint64_t)
}
// NOLINTEND
