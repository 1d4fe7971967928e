#include <cmath>
#include <cstdint>
#include <cstring>

#include "zsseg/ops/blend_cosines.h"
#include "zsseg/ops/blend_cosines_math.h"
#include "zsseg/ops/simd.h"
#include "zsseg/thread_pool.h"

namespace zsseg {
namespace ZSSEG_ISA_NAMESPACE {
namespace {

using namespace simd;

constexpr std::int64_t kGrainValues = 1 << 13;  // some 30 us of work with AVX-512

// As many neighbouring cells of one image as a vector has lanes; planes are `cells` values apart.
struct Cells {
  const float* mask_logits;
  const float* cosines;
  const float* weights;
  const float* shares;
  float* out;
  std::int64_t cells;
  std::int64_t num_classes;
  int count;

  VecF load_of(const float* plane, std::int64_t c) const {
    if (count == kLanes) {
      return load(plane + c * cells);
    }
    float lanes[kLanes] = {};
    std::memcpy(lanes, plane + c * cells, static_cast<std::size_t>(count) * sizeof(float));
    return load(lanes);
  }
  void store_of(std::int64_t c, VecF value) const {
    if (count == kLanes) {
      return store(out + c * cells, value);
    }
    float lanes[kLanes];
    store(lanes, value);
    std::memcpy(out + c * cells, lanes, static_cast<std::size_t>(count) * sizeof(float));
  }
};

// The vector form of blend::is_kept: all bits of a lane set, or none.
ZSSEG_SIMD_FN VecI kept(VecF logit) {
  const VecF limit = splat(-upsample::kAbsentLogit);
  return ~((logit < limit) & (logit > -limit));
}

// NaN where `from` is NaN; the exponentials do not tell it from a number.
ZSSEG_SIMD_FN VecF or_nan(VecF value, VecF from) {
  return from == from ? value : from;
}

// log(sum over classes of exp(value)), each times its share if asked for, without the classes that
// take no part.
template <bool kShares>
ZSSEG_SIMD_FN VecF log_sum(const Cells& at, const float* values) {
  VecF peak = splat(-INFINITY);
  VecF total = splat(0.0f);
  for (std::int64_t c = 0; c < at.num_classes; ++c) {
    if (at.shares[c] > 0.0f) {
      const VecF value = at.load_of(values, c);
      peak = kept(at.load_of(at.mask_logits, c)) ? peak : max(peak, value);
    }
  }
  peak = peak == splat(-INFINITY) ? splat(0.0f) : peak;
  for (std::int64_t c = 0; c < at.num_classes; ++c) {
    if (at.shares[c] > 0.0f) {
      const VecF below = at.load_of(values, c) - peak;
      const VecF term = splat(kShares ? at.shares[c] : 1.0f) * exp_vec(below);
      total += kept(at.load_of(at.mask_logits, c)) ? splat(0.0f) : or_nan(term, below);
    }
  }
  return peak + or_nan(log_vec(total), total);
}

ZSSEG_SIMD_FN VecF log_sigmoid_vec(VecF logit) {
  return min(logit, splat(0.0f)) - log1p_vec(exp_vec(-max(logit, -logit)));
}

template <bool kSoftmax>
void blend_cells(const Cells& at) {
  const VecF cosine_log = log_sum<true>(at, at.cosines);
  const VecF mask_log = kSoftmax ? log_sum<false>(at, at.mask_logits) : splat(0.0f);
  for (std::int64_t c = 0; c < at.num_classes; ++c) {
    const VecF logit = at.load_of(at.mask_logits, c);
    const VecF mask = kSoftmax ? logit - mask_log : log_sigmoid_vec(logit);
    const VecF cosine = at.load_of(at.cosines, c) - cosine_log;
    const VecF mean = splat(1.0f - at.weights[c]) * mask + splat(at.weights[c]) * cosine;
    const VecF log = min(mean, splat(blend::kLargestLog));
    const VecF odds = log - log_vec(-expm1_vec(log));
    at.store_of(c, kept(logit) ? logit : or_nan(odds, mean));
  }
}

}  // namespace

// A vector of cells sums over all classes, then blends them.
void blend_cosines_cpu(const BlendCosinesArgs& args, const BlendCosinesOutputs& outputs) {
  const TensorView& out = outputs.out;
  const std::int64_t num_classes = out.shape[1];
  const std::int64_t cells = out.shape[2] * out.shape[3];
  const std::int64_t vectors = (cells + kLanes - 1) / kLanes;
  const std::int64_t grain = kGrainValues / (kLanes * num_classes) + 1;
  const bool softmax = args.activation == blend::Activation::kSoftmax;
  parallel_for(0, out.shape[0] * vectors, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t index = begin; index < end; ++index) {
      const std::int64_t first = index % vectors * kLanes;
      const std::int64_t at = index / vectors * num_classes * cells + first;
      const std::int64_t left = cells - first;
      const Cells given{args.mask_logits.as<const float>() + at,
                        args.cosines.as<const float>() + at,
                        args.weights.as<const float>(),
                        args.shares.as<const float>(),
                        out.as<float>() + at,
                        cells,
                        num_classes,
                        static_cast<int>(left < kLanes ? left : kLanes)};
      softmax ? blend_cells<true>(given) : blend_cells<false>(given);
    }
  });
}

}  // namespace ZSSEG_ISA_NAMESPACE
}  // namespace zsseg
