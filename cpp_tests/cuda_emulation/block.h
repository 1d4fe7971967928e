// Runs one block of an emulated launch, all its threads on the calling one.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <vector>

namespace cuda_emulation {

constexpr std::size_t kMaxThreads = 1024;      // of a block
constexpr std::size_t kMaxShared = 48 * 1024;  // bytes, static and dynamic together

struct SharedVariable {
  char* from;
  std::size_t bytes;
};
// A kernel's __shared__ variables; none where the program's symbols have been removed.
const std::vector<SharedVariable>& shared_variables(const void* kernel);

// What a GPU would not have survived, or would have left undefined.
class KernelFault : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// One block of a launch.
struct BlockLaunch {
  const std::function<void()>& thread;
  dim3 grid, block;
  std::size_t shared_bytes;  // of dynamic shared memory
  const std::vector<SharedVariable>& variables;
};
// Throws KernelFault where threads wait for each other in ways CUDA leaves undefined.
void run_block(const BlockLaunch& launch, const uint3& block_index);

// Which of `count` blocks runs as number `turn`: launches take turns at ascending, descending and
// scattered order, so that results that depend on it differ from one launch to the next.
std::uint64_t block_at(std::uint64_t turn, std::uint64_t count, std::uint64_t launch);

}  // namespace cuda_emulation
