#include <cstdint>

#include "zsseg/ops/blend_cosines.h"
#include "zsseg/ops/blend_cosines_math.h"
#include "zsseg/thread_pool.h"

namespace zsseg {
namespace ZSSEG_ISA_NAMESPACE {
namespace {

constexpr std::int64_t kBlockCells = 64;
constexpr std::int64_t kGrainValues = 1 << 10;  // about 50 us of work

// One block of cells of one image; planes are `cells` values apart.
struct Block {
  const float* mask_logits;
  const float* cosines;
  const float* weights;
  const float* shares;
  float* out;
  std::int64_t cells;
  std::int64_t num_classes;
  bool softmax;
};

struct Sums {
  blend::LogSum masks[kBlockCells];
  blend::LogSum cosines[kBlockCells];
};

void add_up(const Block& block, int count, Sums& sums) {
  for (int i = 0; i < count; ++i) {
    sums.masks[i] = sums.cosines[i] = blend::no_terms();
  }
  for (std::int64_t c = 0; c < block.num_classes; ++c) {
    const float* logits = block.mask_logits + c * block.cells;
    const float* cosines = block.cosines + c * block.cells;
    if (!(block.shares[c] > 0.0f)) {
      continue;
    }
    for (int i = 0; i < count; ++i) {
      if (blend::is_kept(logits[i])) {
        continue;
      }
      blend::add_term(sums.cosines[i], cosines[i], block.shares[c]);
      if (block.softmax) {
        blend::add_term(sums.masks[i], logits[i], 1.0f);
      }
    }
  }
}

void blend_block(const Block& block, int count) {
  Sums sums;
  add_up(block, count, sums);
  float mask_log[kBlockCells];
  float cosine_log[kBlockCells];
  for (int i = 0; i < count; ++i) {
    mask_log[i] = blend::log_of(sums.masks[i]);
    cosine_log[i] = blend::log_of(sums.cosines[i]);
  }
  for (std::int64_t c = 0; c < block.num_classes; ++c) {
    const float* logits = block.mask_logits + c * block.cells;
    const float* cosines = block.cosines + c * block.cells;
    float* out = block.out + c * block.cells;
    for (int i = 0; i < count; ++i) {
      const float logit = logits[i];
      const float mask = block.softmax ? logit - mask_log[i] : blend::log_sigmoid(logit);
      out[i] = blend::is_kept(logit)
                   ? logit
                   : blend::blended(mask, cosines[i] - cosine_log[i], block.weights[c]);
    }
  }
}

}  // namespace

// A block of cells sums over all classes, then blends them.
void blend_cosines_cpu(const BlendCosinesArgs& args, const TensorView& out) {
  const std::int64_t num_classes = out.shape[1];
  const std::int64_t cells = out.shape[2] * out.shape[3];
  const std::int64_t blocks = (cells + kBlockCells - 1) / kBlockCells;
  const std::int64_t grain = kGrainValues / (kBlockCells * num_classes) + 1;
  parallel_for(0, out.shape[0] * blocks, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t index = begin; index < end; ++index) {
      const std::int64_t first = index % blocks * kBlockCells;
      const std::int64_t at = index / blocks * num_classes * cells + first;
      const std::int64_t left = cells - first;
      blend_block(
          {args.mask_logits.as<const float>() + at, args.cosines.as<const float>() + at,
           args.weights.as<const float>(), args.shares.as<const float>(), out.as<float>() + at,
           cells, num_classes, args.activation == blend::Activation::kSoftmax},
          static_cast<int>(left < kBlockCells ? left : kBlockCells));
    }
  });
}

}  // namespace ZSSEG_ISA_NAMESPACE
}  // namespace zsseg
