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

// While one of these lives, device memory can be reached.
class DeviceAccess {
 public:
  DeviceAccess();
  ~DeviceAccess();
  DeviceAccess(const DeviceAccess&) = delete;
  DeviceAccess& operator=(const DeviceAccess&) = delete;
};

}  // namespace cuda_emulation
