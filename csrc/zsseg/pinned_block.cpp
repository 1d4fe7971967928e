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

using Kind = std::pair<int, std::size_t>;  // device and size

struct Pool {
  std::vector<Addresses> blocks;
  std::uint64_t used = 0;  // when a block of this kind was last taken or given back
};

struct KeptBlocks {
  std::mutex mutex;
  std::map<Kind, Pool> kinds;
  std::size_t bytes = 0;
  std::uint64_t now = 0;
};

// Never destroyed: blocks may go after static objects have.
KeptBlocks& kept_blocks() {
  static auto* const only = new KeptBlocks;
  return *only;
}

bool take(std::size_t bytes, int device, Addresses* block) {
  KeptBlocks& own = kept_blocks();
  const std::lock_guard<std::mutex> lock(own.mutex);
  Pool& pool = own.kinds[{device, bytes}];
  pool.used = ++own.now;
  if (pool.blocks.empty()) {
    return false;
  }
  *block = pool.blocks.back();
  pool.blocks.pop_back();
  own.bytes -= bytes;
  return true;
}

// Keeps the block, and gives those back that were of no use for longest, so that all fit. A block
// that does not fit by itself costs no other its place.
void keep(const Addresses& block, std::size_t bytes, int device) {
  if (bytes > kKeptBytes) {
    cuda::release_pinned(block.host, device);
    return;
  }
  KeptBlocks& own = kept_blocks();
  std::vector<std::pair<Kind, Addresses>> freed;
  {
    const std::lock_guard<std::mutex> lock(own.mutex);
    Pool& pool = own.kinds[{device, bytes}];
    pool.used = ++own.now;
    pool.blocks.push_back(block);
    own.bytes += bytes;
    while (own.bytes > kKeptBytes) {
      const auto oldest = std::min_element(
          own.kinds.begin(), own.kinds.end(),
          [](const auto& a, const auto& b) { return a.second.used < b.second.used; });
      if (!oldest->second.blocks.empty()) {
        freed.emplace_back(oldest->first, oldest->second.blocks.back());
        oldest->second.blocks.pop_back();
        own.bytes -= oldest->first.second;
      }
      if (oldest->second.blocks.empty()) {
        own.kinds.erase(oldest);
      }
    }
  }
  for (const auto& [kind, addresses] : freed) {
    cuda::release_pinned(addresses.host, kind.first);
  }
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
  keep({host_, mapped_}, bytes_, device_);
}

}  // namespace zsseg
