#include "zsseg/pinned_block.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "zsseg/cuda_runtime.h"

namespace zsseg {
namespace {

constexpr std::size_t kKeptBytes = std::size_t{256} << 20;
constexpr std::size_t kStep = 4096;  // sizes are rounded up to pages, so that more blocks fit

struct Addresses {
  void* host;
  void* mapped;
};

struct KeptBlocks {
  std::mutex mutex;
  std::map<std::pair<int, std::size_t>, std::vector<Addresses>> blocks;  // by device and size
  std::size_t bytes = 0;
};

// Never destroyed: blocks may go after static objects have.
KeptBlocks& kept_blocks() {
  static auto* const only = new KeptBlocks;
  return *only;
}

bool take(std::size_t bytes, int device, Addresses* found) {
  KeptBlocks& own = kept_blocks();
  const std::lock_guard<std::mutex> lock(own.mutex);
  auto& blocks = own.blocks[{device, bytes}];
  if (blocks.empty()) {
    return false;
  }
  *found = blocks.back();
  blocks.pop_back();
  own.bytes -= bytes;
  return true;
}

bool keep(const Addresses& block, std::size_t bytes, int device) {
  KeptBlocks& own = kept_blocks();
  const std::lock_guard<std::mutex> lock(own.mutex);
  if (own.bytes + bytes > kKeptBytes) {
    return false;
  }
  own.blocks[{device, bytes}].push_back(block);
  own.bytes += bytes;
  return true;
}

}  // namespace

std::shared_ptr<PinnedBlock> PinnedBlock::create(std::size_t bytes, int device) {
  const std::size_t rounded = (std::max<std::size_t>(bytes, 1) + kStep - 1) / kStep * kStep;
  Addresses block = {};
  if (!take(rounded, device, &block)) {
    block.host = cuda::allocate_pinned(rounded, device);
    block.mapped = cuda::mapped_address(block.host, device);
  }
  return std::shared_ptr<PinnedBlock>(new PinnedBlock(block.host, block.mapped, rounded, device));
}

PinnedBlock::~PinnedBlock() {
  if (!keep({host_, mapped_}, bytes_, device_)) {
    cuda::release_pinned(host_, device_);
  }
}

}  // namespace zsseg
