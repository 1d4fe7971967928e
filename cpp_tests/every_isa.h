// Runs a test body once for every instruction set of this CPU and for one and three threads.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <string>

#include "zsseg/cpu_dispatch.h"
#include "zsseg/thread_pool.h"

namespace zsseg {

template <typename Body>
void for_every_isa(const Body& body) {
  const CpuIsa isa_before = cpu_isa();
  const int threads_before = num_threads();
  for (const CpuIsa isa : available_cpu_isas()) {
    for (const int threads : {1, 3}) {
      SCOPED_TRACE(std::string(name_of(isa)) + ", threads " + std::to_string(threads));
      set_cpu_isa(name_of(isa));
      set_num_threads(threads);
      body();
    }
  }
  set_cpu_isa(name_of(isa_before));
  set_num_threads(threads_before);
}

// Deterministic values in [-1, 1).
inline float noise(std::uint32_t index) {
  std::uint32_t mixed = index * 2654435761u;
  mixed ^= mixed >> 15;
  mixed *= 2246822519u;
  mixed ^= mixed >> 13;
  return static_cast<float>(mixed >> 8) / 8388608.0f - 1.0f;
}

}  // namespace zsseg
