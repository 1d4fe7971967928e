// The arithmetic of upsample_argmax, one element at a time, shared by the CPU and CUDA kernels so
// that it is tested where no GPU is. Products and sums are rounded separately on every target
// (__fmul_rn on the device, -ffp-contract=off on the host): labels are then bit-equal everywhere.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "zsseg/host_device.h"
#include "zsseg/ops/align.h"

namespace zsseg::upsample {

enum class Activation : int { kNone = 0, kSigmoid = 1, kSoftmax = 2 };

// Logits are clamped to +-kLogitLimit and NaN becomes -kLogitLimit, so that no infinity or NaN
// arises from a product with a zero fraction and comparisons order every pair.
constexpr float kLogitLimit = 1e30f;
// A class that is not above this at a pixel is absent there; the smallest non-zero bilinear weight,
// 1 / (2 * 32767)^2, takes -kLogitLimit no higher than this. No class present: an unknown pixel.
constexpr float kAbsentLogit = -1e20f;
// Longest image side: keeps (2 * index + 1) * side within int32.
constexpr int kLongestSide = 32767;
// A class this far below another at all four corners adds less than exp(-25) = 1.4e-11 of the
// other's term to the softmax denominator, below float32 resolution for up to 4000 such classes.
constexpr float kSoftmaxSlack = 25.0f;

ZSSEG_HOST_DEVICE float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

ZSSEG_HOST_DEVICE float add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

ZSSEG_HOST_DEVICE float sanitize(float logit) {
  return logit > kLogitLimit ? kLogitLimit : (logit > -kLogitLimit ? logit : -kLogitLimit);
}

// How the rows or columns of the output lie on the low-resolution grid: output i at grid point
// (step * i + offset) / denominator, in whole numbers, so that positions are exact.
struct Axis {
  int in_size, out_size;
  int step, offset, denominator;
  float inverse;  // 1 / denominator
};

// Half-pixel centres: (i + 0.5) * in_size / out_size - 0.5; corners: i * (in_size - 1) /
// (out_size - 1).
inline Axis make_axis(int in_size, int out_size, Align align) {
  Axis axis = {in_size, out_size, 2 * in_size, in_size - out_size, 2 * out_size, 0.0f};
  if (align == Align::kCorners) {
    axis.step = in_size - 1;
    axis.offset = 0;
    axis.denominator = out_size > 1 ? out_size - 1 : 1;
  }
  axis.inverse = 1.0f / static_cast<float>(axis.denominator);
  return axis;
}

// Where an output row or column lies: between grid points `cell` and `cell + 1`, at fraction `t`.
// The strips outside the outermost grid points belong to the outermost cells at t = 0 or t = 1,
// which is what clamping the edge gives.
struct CellPosition {
  int cell;
  float t;
};

ZSSEG_HOST_DEVICE CellPosition cell_position(int out_index, const Axis& axis) {
  const int numerator = axis.step * out_index + axis.offset;
  if (numerator <= 0 || axis.in_size == 1) {
    return {0, 0.0f};
  }
  const int cell = numerator / axis.denominator;
  if (cell >= axis.in_size - 1) {
    return {axis.in_size - 2, 1.0f};
  }
  return {cell, static_cast<float>(numerator - cell * axis.denominator) /
                    static_cast<float>(axis.denominator)};
}

// The same for half-pixel centres, spelled out: kernels that only know these need fewer registers.
ZSSEG_HOST_DEVICE CellPosition cell_position(int out_index, int in_size, int out_size) {
  const int numerator = (2 * out_index + 1) * in_size - out_size;
  const int denominator = 2 * out_size;
  if (numerator <= 0 || in_size == 1) {
    return {0, 0.0f};
  }
  const int cell = numerator / denominator;
  if (cell >= in_size - 1) {
    return {in_size - 2, 1.0f};
  }
  return {cell,
          static_cast<float>(numerator - cell * denominator) / static_cast<float>(denominator)};
}

// numerator / denominator as a division rounds it, given 1 / denominator as a division rounds it.
// For whole numbers 0 <= numerator < denominator < 2^16: tried for every even denominator, and so
// for half of each, of which all products are exact multiples.
ZSSEG_HOST_DEVICE float quotient(float numerator, float denominator, float inverse) {
  const float near = multiply(numerator, inverse);
  return fmaf(fmaf(-near, denominator, numerator), inverse, near);
}

// The `t` of cell_position for an index that is known to lie in `cell`, without its divisions.
ZSSEG_HOST_DEVICE float fraction_in_cell(int out_index, int cell, const Axis& axis) {
  const int numerator = axis.step * out_index + axis.offset - cell * axis.denominator;
  if (numerator <= 0 || axis.in_size == 1) {
    return 0.0f;
  }
  if (numerator >= axis.denominator) {
    return 1.0f;
  }
  return quotient(static_cast<float>(numerator), static_cast<float>(axis.denominator),
                  axis.inverse);
}

// The first output index that lies in `cell` or a later one.
ZSSEG_HOST_DEVICE int cell_begin(int cell, const Axis& axis) {
  const int num_cells = axis.in_size > 1 ? axis.in_size - 1 : 1;
  if (cell <= 0 || cell >= num_cells) {
    return cell <= 0 ? 0 : axis.out_size;
  }
  // The least i with step * i + offset >= cell * denominator; these stay below 2^31.
  const int wanted = cell * axis.denominator - axis.offset;
  return wanted <= 0 ? 0 : (wanted + axis.step - 1) / axis.step;
}

ZSSEG_HOST_DEVICE int cell_begin(int cell, int in_size, int out_size) {
  const int num_cells = in_size > 1 ? in_size - 1 : 1;
  if (cell <= 0 || cell >= num_cells) {
    return cell <= 0 ? 0 : out_size;
  }
  // The least i with (2 * i + 1) * in_size - out_size >= cell * 2 * out_size.
  const std::uint32_t step = 2u * static_cast<std::uint32_t>(in_size);
  const std::uint32_t wanted =
      (2u * static_cast<std::uint32_t>(cell) + 1u) * static_cast<std::uint32_t>(out_size);
  return wanted <= step / 2 ? 0 : static_cast<int>((wanted + step / 2 - 1u) / step);
}

// (1-t)*a + t*b with s = 1-t. Non-decreasing in a and in b under rounding, because each rounded
// product and the rounded sum are; a + t*(b-a) is not. So c <= d at all four corners of a cell
// gives c <= d at each of its pixels *as computed*, and such a class c can be dropped.
ZSSEG_HOST_DEVICE float mix(float s, float a, float t, float b) {
  return add(multiply(s, a), multiply(t, b));
}

ZSSEG_HOST_DEVICE float bilinear(const float corner[4], float sy, float ty, float sx, float tx) {
  return mix(sx, mix(sy, corner[0], ty, corner[2]), tx, mix(sy, corner[1], ty, corner[3]));
}

// Ties go to the lowest index, so a class may be dropped for a *later* one only if it is below it
// at every pixel as computed. Two rounded mixes err by at most 4u * sum(w*|x|), u = 2^-24. With
// gaps g_k = d_k - c_k > 0 and |c_k| <= |d_k| + g_k the exact gap sum(w*g) exceeds both errors,
// 4u * sum(w*(2|d_k| + g_k)), once every g_k > 16u * |d_k|; FLT_MIN covers products that underflow.
ZSSEG_HOST_DEVICE float strictly_below(float dominator) {
  const float magnitude = dominator < 0.0f ? -dominator : dominator;
  return add(dominator, -add(multiply(0x1p-20f, magnitude), FLT_MIN));
}

// A class that may push others out of a cell.
struct Dominator {
  float value[4];      // its logits at the corners: top left, top right, bottom left, bottom right
  float threshold[4];  // a class of lower index is dropped if it is below all of these
  int index;
};

// slack 0: only classes that cannot win are dropped; larger: only those that are farther below.
ZSSEG_HOST_DEVICE Dominator make_dominator(const float corner[4], int index, float slack) {
  Dominator dominator;
  dominator.index = index;
  for (int k = 0; k < 4; ++k) {
    dominator.value[k] = add(corner[k], -slack);
    dominator.threshold[k] = strictly_below(dominator.value[k]);
  }
  return dominator;
}

ZSSEG_HOST_DEVICE bool is_dominated(const float corner[4], int index, const Dominator& by) {
  bool later = index > by.index;
  bool below = true;
  for (int k = 0; k < 4; ++k) {
    below = below && (later ? corner[k] <= by.value[k] : corner[k] < by.threshold[k]);
  }
  return below;
}

ZSSEG_HOST_DEVICE float sigmoid(float logit) {
  return 1.0f / (1.0f + expf(-logit));
}

// The best class of one group (seen or unseen) at a pixel; index `kNoClass` if none is present.
struct Best {
  float logit;
  int index;
};
constexpr int kNoClass = 65535;

// A class as pixels carry it: its index in the high half, so that ids are ordered as classes are,
// and the label it is stored as in the low half, so that a table of labels costs nothing a pixel.
constexpr std::int32_t kNoId = 0x7fffffff;  // no class: index kNoClass, stored as unknown

ZSSEG_HOST_DEVICE std::int32_t class_id(int index, std::uint32_t label) {
  return static_cast<std::int32_t>((static_cast<std::uint32_t>(index) ^ 0x8000u) << 16 | label);
}

ZSSEG_HOST_DEVICE int class_of_id(std::int32_t id) {
  return static_cast<int>((static_cast<std::uint32_t>(id) >> 16) ^ 0x8000u);
}

ZSSEG_HOST_DEVICE void take_better(Best& best, float logit, int index) {
  if (logit > best.logit || (logit == best.logit && index < best.index && logit > kAbsentLogit)) {
    best = {logit, index};
  }
}

struct Winner {
  float score;
  int index;
};

// `denominator` is the sum over all classes of exp(logit - peak), peak the greater of the two best
// logits; it is read for softmax only.
ZSSEG_HOST_DEVICE float activate(const Best& best, Activation activation, float peak,
                                 float denominator) {
  if (best.index == kNoClass) {
    return -INFINITY;
  }
  switch (activation) {
    case Activation::kSigmoid:
      return sigmoid(best.logit);
    case Activation::kSoftmax:
      return expf(best.logit - peak) / denominator;
    default:
      return best.logit;
  }
}

// Activations rise with the logit, so each group's best class is the only one that can win for it.
ZSSEG_HOST_DEVICE Winner pick_winner(const Best& unseen, const Best& seen, Activation activation,
                                     float seen_bias, float denominator) {
  const float peak = unseen.logit > seen.logit ? unseen.logit : seen.logit;
  const float unseen_score = activate(unseen, activation, peak, denominator);
  const float seen_score = activate(seen, activation, peak, denominator);
  const float calibrated = seen_score - seen_bias;
  const bool seen_wins =
      calibrated > unseen_score || (calibrated == unseen_score && seen.index < unseen.index);
  Winner winner = seen_wins ? Winner{seen_score, seen.index} : Winner{unseen_score, unseen.index};
  if (winner.index == kNoClass && activation != Activation::kNone) {
    winner.score = 0.0f;
  }
  return winner;
}

}  // namespace zsseg::upsample
