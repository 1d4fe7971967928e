#include <cstdint>

#include "zsseg/ops/warp_blend.h"
#include "zsseg/ops/warp_blend_math.h"
#include "zsseg/thread_pool.h"

namespace zsseg {
namespace ZSSEG_ISA_NAMESPACE {
namespace {

constexpr std::int64_t kBlockCells = 128;
constexpr std::int64_t kGrainValues = 1 << 14;  // about 50 us of work

// Taps of a block of cells, each member for itself so that loops over cells are ones of vectors.
struct BlockTaps {
  std::int32_t corner[4][kBlockCells];
  float tx[kBlockCells];
  float ty[kBlockCells];
  float weight[kBlockCells];
};

void find_taps(const float* flow,    // [h, w, 2]
               const float* weight,  // [h, w]
               std::int64_t first, int count, std::int32_t height, std::int32_t width,
               BlockTaps& taps) {
  for (int i = 0; i < count; ++i) {
    const std::int64_t cell = first + i;
    const warp::CellTap tap = warp::cell_tap(static_cast<std::int32_t>(cell % width),
                                             static_cast<std::int32_t>(cell / width), width, height,
                                             flow[2 * cell], flow[2 * cell + 1], weight[cell]);
    for (int k = 0; k < 4; ++k) {
      taps.corner[k][i] = tap.corner[k];
    }
    taps.tx[i] = tap.tx;
    taps.ty[i] = tap.ty;
    taps.weight[i] = tap.weight;
  }
}

void blend_block(const float* logits,  // at the block
                 const float* past,    // the whole plane
                 const BlockTaps& taps, int count, float* out) {
  for (int i = 0; i < count; ++i) {
    out[i] = warp::blend(logits[i], past[taps.corner[0][i]], past[taps.corner[1][i]],
                         past[taps.corner[2][i]], past[taps.corner[3][i]], taps.tx[i], taps.ty[i],
                         taps.weight[i]);
  }
}

}  // namespace

// A block of cells finds its taps once, for all classes.
void warp_blend_cpu(const WarpBlendArgs& args, const TensorView& out) {
  const std::int64_t num_classes = out.shape[1];
  const auto height = static_cast<std::int32_t>(out.shape[2]);
  const auto width = static_cast<std::int32_t>(out.shape[3]);
  const std::int64_t cells = out.shape[2] * out.shape[3];
  const std::int64_t blocks = (cells + kBlockCells - 1) / kBlockCells;
  const std::int64_t grain = kGrainValues / (kBlockCells * num_classes) + 1;
  parallel_for(0, out.shape[0] * blocks, grain, [&](std::int64_t begin, std::int64_t end) {
    BlockTaps taps;
    for (std::int64_t block = begin; block < end; ++block) {
      const std::int64_t image = block / blocks;
      const std::int64_t first = block % blocks * kBlockCells;
      const std::int64_t left = cells - first;
      const int count = static_cast<int>(left < kBlockCells ? left : kBlockCells);
      find_taps(args.flow.as<const float>() + 2 * image * cells,
                args.past_weight.as<const float>() + image * cells, first, count, height, width,
                taps);
      for (std::int64_t c = image * num_classes; c < (image + 1) * num_classes; ++c) {
        blend_block(args.logits.as<const float>() + c * cells + first,
                    args.past.as<const float>() + c * cells, taps, count,
                    out.as<float>() + c * cells + first);
      }
    }
  });
}

}  // namespace ZSSEG_ISA_NAMESPACE
}  // namespace zsseg
