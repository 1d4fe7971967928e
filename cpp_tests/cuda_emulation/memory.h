// Device memory that only kernels and copies can reach.
#pragma once

#include <cstddef>

namespace cuda_emulation {

// Every allocation ends (to 256 bytes) where an unmapped page begins, is full of NaN at first, is
// never handed out again, and cannot be read or written by the host: a wrong access crashes.
// Returns null where memory is lacking.
void* allocate(std::size_t bytes);
// False where this is no allocation, or where something wrote just before or past it.
bool release(void* pointer);
void release_all();
bool is_allocated(const void* pointer);  // the address lies within an allocation
void fill_with_poison(void* pointer);    // an allocation's content

// Page-locked memory, full of NaN at first. The device sees it at another address, as it may on a
// GPU; after the release both crash. Null, or false, as above.
void* allocate_pinned(std::size_t bytes);
bool release_pinned(void* pointer);
bool is_pinned(const void* pointer);  // the host's address
void* mapped_address(void* pinned);   // null where this is no such memory

// While one of these lives, device memory can be reached.
class DeviceAccess {
 public:
  DeviceAccess();
  ~DeviceAccess();
  DeviceAccess(const DeviceAccess&) = delete;
  DeviceAccess& operator=(const DeviceAccess&) = delete;
};

}  // namespace cuda_emulation
