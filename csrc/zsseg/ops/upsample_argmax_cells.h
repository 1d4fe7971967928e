// The CPU kernel's inner half: which classes of a cell can win, and which of them does at each
// pixel. Included by upsample_argmax_cpu.cpp only, once per instruction set.
//
// Classes sit at *positions*: each group (unseen, seen) is contiguous, in class order, and padded
// with absent classes to kClassAlign.
#pragma once

#include "zsseg/ops/upsample_argmax_math.h"
#include "zsseg/ops/upsample_argmax_simd.h"

namespace zsseg::upsample {
namespace {

constexpr int kClassAlign = 16;
constexpr int kRows = 4;  // output rows evaluated together: as many chains as hide the latency
// Floats of scratch a position: class, four corners, left and right edge for kRows rows.
constexpr int kScratchFloats = 5 + 2 * kRows;

// One image, where its results go, and the two rows of its low-resolution grid that a thread holds
// re-laid for the cells between them: row r at place r % 2.
struct Image {
  const void* logits;  // [classes, in_height * in_width]
  int in_height, in_width, out_height, out_width;
  int num_groups;
  int group_begin[3];                // positions of group g: [group_begin[g], group_begin[g + 1])
  const std::int32_t* ids;           // [positions] by class_id; kNoId is padding
  float* vectors;                    // [2, in_width, positions]
  float* top_logit;                  // [num_groups, 2, in_width]
  std::int32_t* top;                 // [num_groups, 2, in_width]: the best position, ~position if
                                     // another class comes near it or it is absent
  std::int32_t* rows;                // [2]: which rows these are; -1 is none
  const float *row_s, *row_t;        // [out_height + kRows]: 1 - t and t of every output row
  const float *column_s, *column_t;  // [out_width + kLanes]
  const std::int32_t *row_begin, *column_begin;  // first output row or column of every cell, + end
  void* labels;                                  // [out_height, out_width]
  float* scores;                                 // [out_height, out_width] or null
  Activation activation;
  float seen_bias;
  float unknown_below;  // -infinity: no threshold
  bool needs_scores;    // to be written or to be compared with unknown_below
  bool needs_denominator;

  int positions() const { return group_begin[num_groups]; }
  int held_points() const { return 2 * in_width; }
};

// The classes of one group that stay in a cell.
struct Survivors {
  int count;
  std::int32_t* ids;  // [capacity] by class_id
  float* corners;     // [capacity, 4]
  float* sides;       // [capacity, 2, kRows]: values on the cell's left and right edge
};

struct Cell {
  const float* corner[4];  // class vectors [positions]
  int point[4];            // held grid points, for Image::top
};

ZSSEG_SIMD_FN int decode(std::int32_t top) {
  return top < 0 ? ~top : top;
}

// The class that is clearly best at all four corners, so at every pixel: differences of two
// bilinear patches are bilinear and have their extremes at the corners. -1 if there is none.
ZSSEG_SIMD_FN int constant_position(const Image& image, const Cell& cell, int group) {
  const std::int32_t* top = image.top + group * image.held_points();
  const std::int32_t first = top[cell.point[0]];
  const bool same =
      first == top[cell.point[1]] && first == top[cell.point[2]] && first == top[cell.point[3]];
  return same && first >= 0 ? first : -1;
}

// The class with the greatest smallest corner: the one most able to push others out.
static int strongest_minimum(const Cell& cell, int begin, int end) {
  VecF best = splat(-2.0f * kLogitLimit);
  VecI where = splat_int(begin);
  for (int p = begin; p < end; p += kLanes) {
    const VecF low = min(min(load(cell.corner[0] + p), load(cell.corner[1] + p)),
                         min(load(cell.corner[2] + p), load(cell.corner[3] + p)));
    where = low > best ? lane_numbers() + p : where;
    best = max(low, best);
  }
  int winner = 0;
  for (int lane = 1; lane < kLanes; ++lane) {
    winner = best[lane] > best[winner] ? lane : winner;
  }
  return where[winner];
}

constexpr int kMaxDominators = 5;

static int find_dominators(const Image& image, const Cell& cell, int group, float slack,
                           Dominator* dominators) {
  const std::int32_t* top = image.top + group * image.held_points();
  int candidates[kMaxDominators];
  candidates[0] = strongest_minimum(cell, image.group_begin[group], image.group_begin[group + 1]);
  int count = 1;
  for (int k = 0; k < 4; ++k) {
    const int candidate = decode(top[cell.point[k]]);
    bool is_listed = false;
    for (int i = 0; i < count; ++i) {
      is_listed = is_listed || candidates[i] == candidate;
    }
    if (!is_listed) {
      candidates[count++] = candidate;
    }
  }
  for (int i = 0; i < count; ++i) {
    float corner[4];
    for (int k = 0; k < 4; ++k) {
      corner[k] = cell.corner[k][candidates[i]];
    }
    dominators[i] = make_dominator(corner, candidates[i], slack);
  }
  return count;
}

// Which of the kLanes classes from position p on are pushed out by one of the dominators.
ZSSEG_SIMD_FN uint32_t dominated_lanes(const Cell& cell, int p, const Dominator* dominators,
                                       int count) {
  const VecF c0 = load(cell.corner[0] + p), c1 = load(cell.corner[1] + p);
  const VecF c2 = load(cell.corner[2] + p), c3 = load(cell.corner[3] + p);
  constexpr uint32_t kAll = (1u << (kLanes - 1)) * 2u - 1u;
  VecI out = splat_int(0);
  for (int i = 0; i < count; ++i) {
    const Dominator& by = dominators[i];
    if (p > by.index) {
      out |= (c0 <= splat(by.value[0])) & (c1 <= splat(by.value[1])) & (c2 <= splat(by.value[2])) &
             (c3 <= splat(by.value[3]));
    } else {  // stricter than need be for lanes after by.index; never drops by.index itself
      out |= (c0 < splat(by.threshold[0])) & (c1 < splat(by.threshold[1])) &
             (c2 < splat(by.threshold[2])) & (c3 < splat(by.threshold[3]));
    }
    if (bits(out) == kAll) {
      return kAll;
    }
  }
  return bits(out);
}

static void add_survivor(const Image& image, const Cell& cell, int position, Survivors& survivors) {
  survivors.ids[survivors.count] = image.ids[position];
  for (int k = 0; k < 4; ++k) {
    survivors.corners[4 * survivors.count + k] = cell.corner[k][position];
  }
  ++survivors.count;
}

static void prune(const Image& image, const Cell& cell, int group, float slack,
                  Survivors& survivors) {
  Dominator dominators[kMaxDominators];
  const int count = find_dominators(image, cell, group, slack, dominators);
  constexpr uint32_t kAll = (1u << (kLanes - 1)) * 2u - 1u;
  survivors.count = 0;
  for (int p = image.group_begin[group]; p < image.group_begin[group + 1]; p += kLanes) {
    uint32_t stay = ~dominated_lanes(cell, p, dominators, count) & kAll;
    for (; stay != 0; stay &= stay - 1) {
      add_survivor(image, cell, p + __builtin_ctz(stay), survivors);
    }
  }
}

// Values on the cell's left and right edge for the kRows output rows from `row` on.
static void set_sides(const Image& image, int row, Survivors& survivors) {
  const Vec4F s = load4(image.row_s + row), t = load4(image.row_t + row);
  for (int i = 0; i < survivors.count; ++i) {
    const float* corner = survivors.corners + 4 * i;
    const Vec4F left = s * corner[0] + t * corner[2];
    const Vec4F right = s * corner[1] + t * corner[3];
    store4(survivors.sides + 2 * kRows * i, left);
    store4(survivors.sides + 2 * kRows * i + kRows, right);
  }
}

// kRows x kLanes pixels of one group.
struct Patch {
  VecF logit[kRows];
  VecI id[kRows];
};

ZSSEG_SIMD_FN Patch best_of(const Survivors& survivors, VecF s, VecF t) {
  Patch best;
  for (int r = 0; r < kRows; ++r) {
    best.logit[r] = splat(kAbsentLogit);
    best.id[r] = splat_int(kNoId);
  }
  for (int i = 0; i < survivors.count; ++i) {
    const float* left = survivors.sides + 2 * kRows * i;
    const VecI id = splat_int(survivors.ids[i]);
    for (int r = 0; r < kRows; ++r) {
      const VecF logit = s * splat(left[r]) + t * splat(left[kRows + r]);
      const VecI better = logit > best.logit[r];
      best.logit[r] = better ? logit : best.logit[r];
      best.id[r] = better ? id : best.id[r];
    }
  }
  return best;
}

// Adds exp(logit - peak) of every survivor.
ZSSEG_SIMD_FN void add_exponentials(const Survivors& survivors, VecF s, VecF t, const VecF* peak,
                                    VecF* sum) {
  for (int i = 0; i < survivors.count; ++i) {
    const float* left = survivors.sides + 2 * kRows * i;
    for (int r = 0; r < kRows; ++r) {
      sum[r] += exp_vec(s * splat(left[r]) + t * splat(left[kRows + r]) - peak[r]);
    }
  }
}

ZSSEG_SIMD_FN VecF activate_vec(VecF logit, VecI id, Activation activation, VecF peak,
                                VecF denominator) {
  VecF value = logit;
  if (activation == Activation::kSigmoid) {
    value = sigmoid_vec(logit);
  } else if (activation == Activation::kSoftmax) {
    value = exp_vec(logit - peak) / denominator;
  }
  return id == kNoId ? splat(-__builtin_inff()) : value;
}

}  // namespace
}  // namespace zsseg::upsample
