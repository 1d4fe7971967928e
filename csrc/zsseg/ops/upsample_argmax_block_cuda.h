// The first half of upsample_argmax's CUDA kernel: which classes can win in the cells of a block.
// Included by upsample_argmax_cuda.cu only.
#pragma once

#include <cstdint>

#include "zsseg/cuda_launch.h"
#include "zsseg/half.h"
#include "zsseg/ops/upsample_argmax_math.h"

namespace zsseg::upsample {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kColumns = kWarps + 1;  // grid points of a block side by side
constexpr int kPoints = 2 * kColumns;
constexpr int kStride = kPoints + 1;  // floats a class: odd, so that lanes meet different banks
constexpr int kStagers = kThreads / kPoints;  // classes that the block reads at once
constexpr int kChunk = 192;                   // classes in shared memory; a multiple of 32
constexpr int kWindow = 64;                   // surviving classes laid out at once
constexpr int kDominators = 5;
constexpr int kSeenWords = 256;
constexpr int kSeenBit = 1 << 16;  // of a survivor: above its class index
constexpr unsigned kFullWarp = 0xffffffffu;

struct Problem {
  const void* logits;        // float, Half or Bfloat16 [batch, num_classes, in_height, in_width]
  const std::uint8_t* seen;  // [num_classes], or null: the bits below
  const void* label_table;   // Label [num_classes], or null
  const std::int32_t* valid_classes;  // [1]: how many classes count, or null: all
  void* labels;                       // Label [batch, out_height, out_width]
  float* scores;                      // [batch, out_height, out_width], or null
  int num_classes, in_height, in_width, out_height, out_width;
  int cell_columns, slices;
  Axis rows, columns;
  float seen_bias, unknown_below;
  bool is_half, is_bfloat16, wide_labels, aligned, needs_scores, needs_denominator;
  std::uint32_t seen_bits[kSeenWords];  // from host memory, a bit a class
};

struct alignas(16) Corners {
  float value[4];  // top left, top right, bottom left, bottom right
};

struct Candidate {
  float value;
  int index;
};

// The work of a warp. In shared memory: registers are scarce.
struct WarpCell {
  int num_classes;  // that count
  int cell_row, cell_column;
  int row_begin, row_end, column_begin, column_end;  // of the image

  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int warp() { return threadIdx.x / 32; }
  __device__ bool is_empty() const { return column_begin >= column_end; }
};

__device__ float widen(float value) {
  return value;
}
__device__ float widen(Half value) {
  return half_to_float(value);
}
__device__ float widen(Bfloat16 value) {
  return bfloat16_to_float(value);
}

template <int kGroups>
struct WarpShared {
  WarpCell cell;
  int num_survivors;
  Corners corners[kWindow];  // of survivors
  int survivors[kWindow];    // class index, kSeenBit where seen
  Dominator dominators[kGroups][kDominators];
};

template <int kGroups>
struct SharedBlock {
  WarpShared<kGroups> warps[kWarps];
  float tile[kChunk * kStride];
};

// A bit for every class that stays in the warp's cell, [num_classes / 32].
__device__ std::uint32_t* stay_of_warp(const Problem& problem) {
  return dynamic_shared<std::uint32_t>() + WarpCell::warp() * ((problem.num_classes + 31) / 32);
}

// Of the block's image, in elements of the logits.
__device__ std::int64_t first_logit(const Problem& problem) {
  return blockIdx.z * (std::int64_t{problem.num_classes} * problem.in_height * problem.in_width);
}

// The logit of a class at a corner of a cell; beyond the grid's edge that of the edge.
__device__ float logit_at(const Problem& problem, int c, int row, int column) {
  row = row < problem.in_height ? row : problem.in_height - 1;
  column = column < problem.in_width ? column : problem.in_width - 1;
  const std::int64_t at = first_logit(problem) +
                          (std::int64_t{c} * problem.in_height + row) * problem.in_width + column;
  if (problem.is_bfloat16) {
    return sanitize(widen(static_cast<const Bfloat16*>(problem.logits)[at]));
  }
  return sanitize(problem.is_half ? widen(static_cast<const Half*>(problem.logits)[at])
                                  : static_cast<const float*>(problem.logits)[at]);
}

// Classes [first, first + count) into the tile. All threads of the block call it together; thread t
// reads point t % kPoints of every kStagers-th class.
template <typename T>
__device__ void stage(const Problem& problem, const WarpCell& cell, int first, int count,
                      float* tile) {
  const int point = threadIdx.x % kPoints, stager = threadIdx.x / kPoints;
  const int first_column = blockIdx.x * kWarps + point % kColumns;
  const int column = first_column < problem.in_width ? first_column : problem.in_width - 1;
  const int row = cell.cell_row + point / kColumns < problem.in_height
                      ? cell.cell_row + point / kColumns
                      : problem.in_height - 1;
  const std::int64_t plane = std::int64_t{problem.in_height} * problem.in_width;
  const T* from = static_cast<const T*>(problem.logits) + first_logit(problem) +
                  (first + stager) * plane + std::int64_t{row} * problem.in_width + column;
  const int end = stager < kStagers ? count : 0;
  ZSSEG_UNROLL(4)
  for (int c = stager; c < end; c += kStagers, from += kStagers * plane) {
    tile[c * kStride + point] = sanitize(widen(*from));
  }
}

// Which classes are in the tile.
class Staged {
 public:
  __device__ explicit Staged(float* tile) : tile_(tile) {}

  // All threads of the block call it together.
  __device__ void hold(const Problem& problem, const WarpCell& cell, int first) {
    if (first == first_) {
      return;
    }
    first_ = first;
    __syncthreads();
    if (problem.is_half) {
      stage<Half>(problem, cell, first, count(cell), tile_);
    } else if (problem.is_bfloat16) {
      stage<Bfloat16>(problem, cell, first, count(cell), tile_);
    } else {
      stage<float>(problem, cell, first, count(cell), tile_);
    }
    __syncthreads();
  }
  __device__ int first() const { return first_; }
  __device__ int count(const WarpCell& cell) const {
    return cell.num_classes - first_ < kChunk ? cell.num_classes - first_ : kChunk;
  }
  __device__ Corners corners(const WarpCell& cell, int c) const {
    const float* at = tile_ + (c - first_) * kStride + cell.warp();
    return {{at[0], at[1], at[kColumns], at[kColumns + 1]}};
  }

 private:
  float* tile_;
  int first_ = -1;
};

// Copies those of any class: from the tile where it holds all of them.
__device__ void copy_corners(const Problem& problem, const WarpCell& cell, const Staged& staged,
                             int c, Corners& to) {
  if (cell.num_classes <= kChunk) {
    to = staged.corners(cell, c);
    return;
  }
  ZSSEG_UNROLL(1)
  for (int k = 0; k < 4; ++k) {
    to.value[k] = logit_at(problem, c, cell.cell_row + k / 2, cell.cell_column + k % 2);
  }
}

template <int kGroups>
__device__ int group_of(const Problem& problem, int c) {
  if (kGroups == 1) {
    return 0;
  }
  return problem.seen != nullptr ? (problem.seen[c] != 0 ? 1 : 0)
                                 : static_cast<int>(problem.seen_bits[c / 32] >> (c % 32) & 1u);
}

__device__ Candidate warp_best(Candidate mine) {
  for (int step = 16; step > 0; step /= 2) {
    const float value = __shfl_xor_sync(kFullWarp, mine.value, step);
    const int index = __shfl_xor_sync(kFullWarp, mine.index, step);
    if (value > mine.value || (value == mine.value && index < mine.index)) {
      mine = {value, index};
    }
  }
  return mine;
}

// The best class of a group at each corner of a cell, and the one with the greatest smallest
// corner, of those that one lane looks at.
struct Candidates {
  Candidate best[kDominators];

  __device__ explicit Candidates(const WarpCell& cell) {
    for (Candidate& candidate : best) {
      candidate = {-2.0f * kLogitLimit, cell.num_classes};
    }
  }

  __device__ void add(const Corners& corners, int c) {
    float low = corners.value[0];
    for (int k = 0; k < 4; ++k) {
      low = corners.value[k] < low ? corners.value[k] : low;
      best[k] = corners.value[k] > best[k].value ? Candidate{corners.value[k], c} : best[k];
    }
    best[4] = low > best[4].value ? Candidate{low, c} : best[4];
  }
};

// Those of all lanes can push others out. Returns a bit for each that differs from those before it.
__device__ unsigned make_dominators(const Problem& problem, const WarpCell& cell,
                                    const Staged& staged, Candidates& candidates, Corners* scratch,
                                    Dominator* dominators) {
  int mine = cell.num_classes;  // as in a group without classes
  unsigned unique = 0;
  ZSSEG_UNROLL()
  for (int i = 0; i < kDominators; ++i) {
    candidates.best[i] = warp_best(candidates.best[i]);
    const int index = candidates.best[i].index;
    bool is_listed = index >= cell.num_classes;
    ZSSEG_UNROLL()
    for (int before = 0; before < i; ++before) {
      is_listed = is_listed || candidates.best[before].index == index;
    }
    unique |= is_listed ? 0u : 1u << i;
    mine = cell.lane() == i ? index : mine;
  }
  if (mine < cell.num_classes) {
    const float slack = problem.needs_denominator ? kSoftmaxSlack : 0.0f;
    copy_corners(problem, cell, staged, mine, scratch[cell.lane()]);
    dominators[cell.lane()] = make_dominator(scratch[cell.lane()].value, mine, slack);
  }
  __syncwarp();
  return unique;
}

// Sets a bit for every class in the tile that stays and returns how many do. `unique` has
// kDominators bits a group.
template <int kGroups>
__device__ int prune(const Problem& problem, const WarpCell& cell, const Staged& staged,
                     unsigned unique, const Dominator (*dominators)[kDominators]) {
  int num_survivors = 0;
  std::uint32_t* stay = stay_of_warp(problem);
  const int end = staged.first() + staged.count(cell);
  ZSSEG_UNROLL(1)
  for (int base = staged.first(); base < end; base += 32) {
    const int c = base + cell.lane();
    bool stays = c < end;
    if (stays) {
      const int group = group_of<kGroups>(problem, c);
      const Corners corners = staged.corners(cell, c);
      ZSSEG_UNROLL(1)
      for (int i = 0; i < kDominators; ++i) {
        if ((unique >> (kDominators * group + i) & 1u) != 0 && stays) {
          stays = !is_dominated(corners.value, c, dominators[group][i]);
        }
      }
    }
    const unsigned bits = __ballot_sync(kFullWarp, stays);
    if (cell.lane() == 0) {
      stay[base / 32] = bits;
    }
    num_survivors += __popc(bits);
  }
  return num_survivors;
}

// Looks the classes over: first for those that push others out, group by group, then for those that
// stay. All threads of the block call it together.
template <int kGroups>
__device__ void find_survivors(const Problem& problem, Staged& staged,
                               WarpShared<kGroups>& shared) {
  const WarpCell& cell = shared.cell;
  int num_survivors = 0;
  unsigned unique = 0;
  ZSSEG_UNROLL(1)
  for (int pass = 0; pass <= kGroups; ++pass) {
    Candidates candidates(cell);
    for (int first = 0; first < cell.num_classes; first += kChunk) {
      staged.hold(problem, cell, first);
      if (pass == kGroups) {
        num_survivors += prune<kGroups>(problem, cell, staged, unique, shared.dominators);
        continue;
      }
      const int end = first + staged.count(cell);
      ZSSEG_UNROLL(1)
      for (int c = first + cell.lane(); c < end; c += 32) {
        if (kGroups == 1 || group_of<kGroups>(problem, c) == pass) {
          candidates.add(staged.corners(cell, c), c);
        }
      }
    }
    if (pass < kGroups) {
      unique |= make_dominators(problem, cell, staged, candidates, shared.corners,
                                shared.dominators[pass])
                << (kDominators * pass);
    }
  }
  if (cell.lane() == 0) {
    shared.num_survivors = num_survivors;
  }
  __syncwarp();
}

// The survivors of a warp's cell, kWindow of them laid out at a time.
template <int kGroups>
class Survivors {
 public:
  __device__ Survivors(const Problem& problem, const Staged& staged, WarpShared<kGroups>& shared)
      : problem_(problem), staged_(staged), shared_(shared) {
    lay_out(0);
  }

  __device__ const WarpCell& cell() const { return shared_.cell; }

  // Calls take(corners, survivor) for all of them, in class order.
  template <typename Take>
  __device__ void for_each(const Take& take) {
    for (int first = 0; first < shared_.num_survivors; first += kWindow) {
      if (shared_.num_survivors > kWindow) {
        lay_out(first);
      }
      const int end =
          shared_.num_survivors - first < kWindow ? shared_.num_survivors - first : kWindow;
      ZSSEG_UNROLL(1)
      for (int i = 0; i < end; ++i) {
        take(shared_.corners[i], shared_.survivors[i]);
      }
    }
  }

  // The class that all pixels have whatever lies between, or -1. Its score is not looked at.
  __device__ int only_one() const {
    if (shared_.num_survivors != 1) {
      return -1;
    }
    bool present = true;
    for (int k = 0; k < 4; ++k) {
      present = present && shared_.corners[0].value[k] > 0.5f * kAbsentLogit;
    }
    return present ? shared_.survivors[0] % kSeenBit : -1;
  }

 private:
  // Those from `first` on. All lanes call it together.
  __device__ void lay_out(int first) {
    __syncwarp();
    const unsigned before_lane = (1u << shared_.cell.lane()) - 1u;
    int before = -first;
    ZSSEG_UNROLL(1)
    for (int base = 0; base < shared_.cell.num_classes && before < kWindow; base += 32) {
      const std::uint32_t bits = stay_of_warp(problem_)[base / 32];
      const int slot = before + __popc(bits & before_lane);
      if ((bits >> shared_.cell.lane() & 1u) != 0 && slot >= 0 && slot < kWindow) {
        const int c = base + shared_.cell.lane();
        copy_corners(problem_, shared_.cell, staged_, c, shared_.corners[slot]);
        shared_.survivors[slot] = c + (group_of<kGroups>(problem_, c) == 1 ? kSeenBit : 0);
      }
      before += __popc(bits);
    }
    __syncwarp();
  }

  const Problem& problem_;
  const Staged& staged_;
  WarpShared<kGroups>& shared_;
};

}  // namespace
}  // namespace zsseg::upsample
