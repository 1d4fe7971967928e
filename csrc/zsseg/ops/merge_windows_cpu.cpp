#include <algorithm>
#include <cstdint>

#include "zsseg/ops/merge_windows.h"
#include "zsseg/thread_pool.h"

namespace zsseg {
namespace ZSSEG_ISA_NAMESPACE {
namespace {

constexpr std::int64_t kGrainValues = 1 << 15;

// One class: a row of each window at a time, as far as it lies on the grid.
void merge_plane(const MergeWindowsArgs& args, std::int64_t c, std::int64_t rows,
                 std::int64_t columns, float* out) {
  const Shape& window = args.logits.shape;
  const float* shares = args.shares.as<const float>();
  if (!args.add) {
    std::fill(out, out + rows * columns, 0.0f);
  }
  for (int b = 0; b < args.places.count; ++b) {
    const std::int64_t top = args.places.top[b], left = args.places.left[b];
    const float* from = args.logits.as<const float>() + (b * window[1] + c) * window[2] * window[3];
    const std::int64_t bottom = std::min(top + window[2], rows);
    const std::int64_t count = std::min(left + window[3], columns) - left;
    for (std::int64_t y = top; y < bottom; ++y, from += window[3]) {
      const float* share = shares + y * columns + left;
      float* to = out + y * columns + left;
      for (std::int64_t x = 0; x < count; ++x) {
        to[x] = to[x] + share[x] * from[x];
      }
    }
  }
}

}  // namespace

void merge_windows_cpu(const MergeWindowsArgs& args, const TensorView& out) {
  const std::int64_t rows = out.shape[2], columns = out.shape[3];
  const std::int64_t grain = kGrainValues / (rows * columns) + 1;
  parallel_for(0, out.shape[1], grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t c = begin; c < end; ++c) {
      merge_plane(args, c, rows, columns, out.as<float>() + c * rows * columns);
    }
  });
}

}  // namespace ZSSEG_ISA_NAMESPACE
}  // namespace zsseg
