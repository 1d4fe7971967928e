// The CPU kernel's outer half: from cells to labels and scores. Included by upsample_argmax_cpu.cpp
// only, once per instruction set.
#pragma once

#include "zsseg/ops/upsample_argmax_cells.h"

namespace zsseg::upsample {
namespace {

template <typename Label>
ZSSEG_SIMD_FN void put_labels(Label* to, VecI ids, int count) {
  if (count >= kLanes) {
    store_narrow(to, ids);
    return;
  }
  for (int i = 0; i < count; ++i) {
    to[i] = static_cast<Label>(ids[i]);
  }
}

ZSSEG_SIMD_FN void put_scores(float* to, VecF scores, int count) {
  if (count >= kLanes) {
    store(to, scores);
    return;
  }
  for (int i = 0; i < count; ++i) {
    to[i] = scores[i];
  }
}

struct Pixels {
  VecI id;
  VecF score;
};

// The groups that can win in a cell: one, or unseen and seen.
struct Contest {
  int num_groups;
  Survivors survivors[2];
};

// The vector form of pick_winner in upsample_argmax_math.h, then the unknown threshold.
ZSSEG_SIMD_FN Pixels decide(const Image& image, int num_groups, const Patch* best, int row,
                            VecF peak, VecF denominator) {
  Pixels pixels = {best[0].id[row], best[0].logit[row]};
  if (!image.needs_scores && num_groups == 1) {
    return pixels;
  }
  pixels.score =
      activate_vec(best[0].logit[row], best[0].id[row], image.activation, peak, denominator);
  if (num_groups == 2) {
    const VecI seen_id = best[1].id[row];
    const VecF seen =
        activate_vec(best[1].logit[row], seen_id, image.activation, peak, denominator);
    const VecF calibrated = seen - splat(image.seen_bias);
    const VecI seen_wins =
        (calibrated > pixels.score) | ((calibrated == pixels.score) & (seen_id < pixels.id));
    pixels.id = seen_wins ? seen_id : pixels.id;
    pixels.score = seen_wins ? seen : pixels.score;
  }
  pixels.id = pixels.score < splat(image.unknown_below) ? splat_int(kNoId) : pixels.id;
  if (image.activation != Activation::kNone) {
    pixels.score = max(pixels.score, splat(0.0f));  // no class present: -infinity
  }
  return pixels;
}

// Labels kRows x kLanes pixels; writes past the cell's right edge, where the next cell overwrites
// it, but never past the image's.
template <typename Label>
ZSSEG_SIMD_FN void label_patch(const Image& image, const Contest& contest, int row, int num_rows,
                               int column) {
  const VecF s = load(image.column_s + column), t = load(image.column_t + column);
  Patch best[2];
  best[0] = best_of(contest.survivors[0], s, t);
  VecF peak[kRows], sum[kRows];
  if (contest.num_groups == 2) {
    best[1] = best_of(contest.survivors[1], s, t);
  }
  for (int r = 0; r < kRows; ++r) {
    peak[r] = contest.num_groups == 2 ? max(best[0].logit[r], best[1].logit[r]) : best[0].logit[r];
    sum[r] = splat(0.0f);
  }
  if (image.needs_denominator) {
    for (int group = 0; group < contest.num_groups; ++group) {
      add_exponentials(contest.survivors[group], s, t, peak, sum);
    }
  }
  const int count = image.out_width - column;
  for (int r = 0; r < num_rows; ++r) {
    const Pixels pixels = decide(image, contest.num_groups, best, r, peak[r], sum[r]);
    const std::int64_t at = static_cast<std::int64_t>(row + r) * image.out_width + column;
    put_labels(static_cast<Label*>(image.labels) + at, pixels.id, count);
    if (image.scores != nullptr) {
      put_scores(image.scores + at, pixels.score, count);
    }
  }
}

template <typename Label>
void label_mixed_cell(const Image& image, Contest& contest, int row_begin, int row_end,
                      int column_begin, int column_end) {
  for (int row = row_begin; row < row_end; row += kRows) {
    const int num_rows = row_end - row < kRows ? row_end - row : kRows;
    for (int group = 0; group < contest.num_groups; ++group) {
      set_sides(image, row, contest.survivors[group]);
    }
    for (int column = column_begin; column < column_end; column += kLanes) {
      label_patch<Label>(image, contest, row, num_rows, column);
    }
  }
}

template <typename Label>
void fill(const Image& image, Label label, int row_begin, int row_end, int column_begin,
          int column_end) {
  for (int row = row_begin; row < row_end; ++row) {
    Label* to =
        static_cast<Label*>(image.labels) + static_cast<std::int64_t>(row) * image.out_width;
    if (sizeof(Label) == 1) {
      __builtin_memset(to + column_begin, label, static_cast<size_t>(column_end - column_begin));
      continue;
    }
    for (int column = column_begin; column < column_end; ++column) {
      to[column] = label;
    }
  }
}

ZSSEG_SIMD_FN float activated(float logit, Activation activation) {
  return activation == Activation::kSigmoid ? sigmoid_vec(splat(logit))[0] : logit;
}

// Bounds of a group's best activation over a cell: at a corner the best is known, and inside it is
// neither above the greatest corner nor below the smallest corner of any one class.
struct Bounds {
  float low, high;
};

ZSSEG_SIMD_FN Bounds bounds_of(const Image& image, const Cell& cell, int group) {
  const int plane = image.held_points();
  Bounds bounds = {-2.0f * kLogitLimit, -2.0f * kLogitLimit};
  for (int k = 0; k < 4; ++k) {
    const int position = decode(image.top[group * plane + cell.point[k]]);
    float low = cell.corner[0][position];
    for (int other = 1; other < 4; ++other) {
      const float at = cell.corner[other][position];
      low = at < low ? at : low;
    }
    const float high = image.top_logit[group * plane + cell.point[k]];
    bounds.low = low > bounds.low ? low : bounds.low;
    bounds.high = high > bounds.high ? high : bounds.high;
  }
  return bounds;
}

// Of two groups the only one that can win in this cell, -1 if both can. The slack covers rounding.
int only_group(const Image& image, const Cell& cell) {
  if (image.num_groups == 1) {
    return 0;
  }
  if (image.activation == Activation::kSoftmax) {
    return -1;
  }
  const Bounds unseen = bounds_of(image, cell, 0), seen = bounds_of(image, cell, 1);
  if (unseen.low < 0.5f * kAbsentLogit || seen.low < 0.5f * kAbsentLogit) {
    return -1;
  }
  const float unseen_low = activated(unseen.low, image.activation);
  const float unseen_high = activated(unseen.high, image.activation);
  const float seen_low = activated(seen.low, image.activation) - image.seen_bias;
  const float seen_high = activated(seen.high, image.activation) - image.seen_bias;
  const float bias = image.seen_bias < 0.0f ? -image.seen_bias : image.seen_bias;
  const float reach =
      max(splat(unseen_high), splat(-unseen_low))[0] + max(splat(seen_high), splat(-seen_low))[0];
  const float slack = 1e-6f * (1.0f + 2.0f * bias + (reach < 0.0f ? -reach : reach));
  if (unseen_low > seen_high + slack) {
    return 0;
  }
  return seen_low > unseen_high + slack ? 1 : -1;
}

// Survivors of one group, or of both where `group` is -1.
Contest prune_groups(const Image& image, const Cell& cell, int group, float* scratch) {
  const float slack = image.needs_denominator ? kSoftmaxSlack : 0.0f;
  Contest contest = {};
  for (int g = 0; g < image.num_groups; ++g) {
    if (group >= 0 && group != g) {
      continue;
    }
    float* base = scratch + static_cast<std::int64_t>(image.group_begin[g]) * kScratchFloats;
    const int capacity = image.group_begin[g + 1] - image.group_begin[g];
    Survivors& survivors = contest.survivors[contest.num_groups++];
    survivors = {0, reinterpret_cast<std::int32_t*>(base), base + capacity, base + 5 * capacity};
    prune(image, cell, g, slack, survivors);
  }
  return contest;
}

// Neighbouring cells of one label, filled together.
struct Run {
  int label = -1;
  int begin = 0;
};

template <typename Label>
void label_cell_row(const Image& image, int cell_row, int row_begin, int row_end, float* scratch) {
  const int cells = image.in_width > 1 ? image.in_width - 1 : 1;
  const int above = cell_row % 2 * image.in_width;
  const int below = image.in_height > 1 ? (cell_row + 1) % 2 * image.in_width : above;
  const int beside = image.in_width > 1 ? 1 : 0;
  const std::int64_t positions = image.positions();
  Run run;
  for (int c = 0; c < cells; ++c) {
    const int column_begin = image.column_begin[c], column_end = image.column_begin[c + 1];
    if (column_begin == column_end) {
      continue;
    }
    Cell cell = {{}, {above + c, above + c + beside, below + c, below + c + beside}};
    for (int k = 0; k < 4; ++k) {
      cell.corner[k] = image.vectors + cell.point[k] * positions;
    }
    const int group = only_group(image, cell);
    const int constant =
        group >= 0 && !image.needs_scores ? constant_position(image, cell, group) : -1;
    const int label = constant >= 0 ? image.ids[constant] & 0xffff : -1;
    if (label != run.label) {
      if (run.label >= 0) {
        fill(image, static_cast<Label>(run.label), row_begin, row_end, run.begin, column_begin);
      }
      run = {label, column_begin};
    }
    if (label >= 0) {
      continue;
    }
    Contest contest = prune_groups(image, cell, group, scratch);
    label_mixed_cell<Label>(image, contest, row_begin, row_end, column_begin, column_end);
  }
  if (run.label >= 0) {
    fill(image, static_cast<Label>(run.label), row_begin, row_end, run.begin, image.out_width);
  }
}

}  // namespace
}  // namespace zsseg::upsample
