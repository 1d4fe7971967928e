// The workspace with which several blocks share the depth of a product on CUDA, where the result
// alone would not keep every multiprocessor busy.
#pragma once

#include <cstdint>

#include "zsseg/tensor_view.h"

namespace zsseg {

// uint8 at a multiple of 4: kHeadBytes, zeros before the first call and after every call, then
// what blocks hand over. Fewer bytes allow fewer blocks; the result differs by rounding only.
struct DepthWorkspace {
  static constexpr std::int64_t kVoteBytes = 16;  // see FiniteCheck
  static constexpr std::int64_t kHeadBytes = 2048;
  static constexpr std::int64_t kMostTiles = (kHeadBytes - kVoteBytes) / 4;
  static constexpr std::int64_t kBlockBytes = 4 * (32 * 16 + 32 + 16);
  static constexpr std::int64_t kMostBlocks = 256;
  static constexpr std::int64_t kBytes = kHeadBytes + kMostBlocks * kBlockBytes;
};

// Nothing is asked of an absent workspace.
void expect_workspace(const TensorView& workspace, const char* other_name, const TensorView& other);

}  // namespace zsseg
