// upsample_argmax on CUDA, without ever holding [classes, out_height, out_width].
//
// 1. gather: [classes, points] -> [points, classes], made finite, so that threads over classes read
//    a cell's corners coalesced.
// 2. label: one block a cell (or a slice of its rows). Its threads look over the classes for those
//    able to push others out, drop what they dominate (a ballot gives 32 classes' fate at once),
//    lay the rest out in shared memory and then take one pixel each.
// Bound by reading the class vectors (four times over, from L2) where cells are small, by the
// pixels where they are large.
#include <cstdint>

#include "zsseg/cuda_launch.h"
#include "zsseg/cuda_raii.h"
#include "zsseg/dtype_dispatch.h"
#include "zsseg/ops/upsample_argmax.h"

namespace zsseg {
namespace {

using namespace zsseg::upsample;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = 32;        // points and classes a block of gather transposes
constexpr int kMaxWords = 2048;  // 32 classes a word, 65536 at most
constexpr int kShared = 256;     // surviving classes in shared memory at once
constexpr int kDominators = 5;
constexpr int kMaxPixels = 4096;  // a block's share of a cell
constexpr unsigned kFullWarp = 0xffffffffu;

// Kernel parameters: seen flags that came from host memory, one bit a class.
struct SeenBits {
  std::uint32_t words[256];
};

struct Problem {
  const float* vectors;               // [batch, in_height * in_width, num_classes]
  const std::uint8_t* seen;           // [num_classes], or null: one group
  const void* label_table;            // Label [num_classes or more], or null
  const std::int32_t* valid_classes;  // [1]: how many classes count; null: all
  float* scores;                      // [batch, out_height, out_width] or null
  int stride;                         // of vectors: classes, whether they count or not
  int num_classes, in_height, in_width, out_height, out_width;
  int cell_rows, cell_columns, slices;
  Activation activation;
  float seen_bias, unknown_below;
  bool needs_denominator;
};

// One thread a class. Bound by its launch.
__global__ void unpack_seen_kernel(SeenBits bits, std::uint8_t* __restrict__ seen,  // [num_classes]
                                   int num_classes) {
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c < num_classes) {
    seen[c] = bits.words[c / 32] >> (c % 32) & 1u;
  }
}

__device__ float widen(float value) {
  return value;
}
__device__ float widen(Half value) {
  return half_to_float(value);
}

// A block transposes kTile x kTile elements through shared memory. Bound by memory.
template <typename T>
__global__ void gather_kernel(const T* __restrict__ logits,  // [batch, num_classes, points]
                              float* __restrict__ vectors,   // [batch, points, num_classes]
                              int num_classes, int points) {
  __shared__ float tile[kTile][kTile + 1];
  const std::int64_t image = std::int64_t{blockIdx.z} * num_classes * points;
  const int first_point = blockIdx.x * kTile, first_class = blockIdx.y * kTile;
  for (int row = threadIdx.y; row < kTile; row += blockDim.y) {
    const int c = first_class + row, point = first_point + threadIdx.x;
    if (c < num_classes && point < points) {
      tile[row][threadIdx.x] = sanitize(widen(logits[image + std::int64_t{c} * points + point]));
    }
  }
  __syncthreads();
  for (int row = threadIdx.y; row < kTile; row += blockDim.y) {
    const int c = first_class + threadIdx.x, point = first_point + row;
    if (c < num_classes && point < points) {
      vectors[image + std::int64_t{point} * num_classes + c] = tile[threadIdx.x][row];
    }
  }
}

struct Candidate {
  float value;
  int index;
};

__device__ Candidate better(Candidate a, Candidate b) {
  return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

// The best candidate of the block, in every thread.
__device__ Candidate block_best(Candidate mine, Candidate* of_warp) {
  for (int step = 16; step > 0; step /= 2) {
    const Candidate other = {__shfl_xor_sync(kFullWarp, mine.value, step),
                             __shfl_xor_sync(kFullWarp, mine.index, step)};
    mine = better(mine, other);
  }
  if (threadIdx.x % 32 == 0) {
    of_warp[threadIdx.x / 32] = mine;
  }
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) {
    mine = better(mine, of_warp[warp]);
  }
  __syncthreads();
  return mine;
}

struct SharedCell {
  Dominator dominators[2][kDominators];
  Candidate of_warp[kWarps];
  std::uint32_t stay[kMaxWords];  // a bit a class
  int before[kMaxWords];          // survivors in earlier words
  float corner[kShared][4];
  int index[kShared];
};

struct Corners {
  const float* vector[4];  // [num_classes] each

  __device__ void read(int c, float* corner) const {
    for (int k = 0; k < 4; ++k) {
      corner[k] = vector[k][c];
    }
  }
};

__device__ int group_of(const Problem& problem, int c) {
  return problem.seen != nullptr && problem.seen[c] != 0 ? 1 : 0;
}

// The best class at each corner and the one with the greatest smallest corner; an empty group's
// dominators have an index past the classes and push nothing out.
__device__ void find_dominators(const Problem& problem, const Corners& corners, int group,
                                float slack, SharedCell& shared) {
  Candidate best[kDominators];
  for (Candidate& candidate : best) {
    candidate = {-2.0f * kLogitLimit, problem.num_classes};
  }
  for (int c = threadIdx.x; c < problem.num_classes; c += kThreads) {
    if (group_of(problem, c) != group) {
      continue;
    }
    float corner[4];
    corners.read(c, corner);
    float low = corner[0];
    for (int k = 0; k < 4; ++k) {
      low = corner[k] < low ? corner[k] : low;
      best[k] = better(best[k], {corner[k], c});
    }
    best[4] = better(best[4], {low, c});
  }
  for (int i = 0; i < kDominators; ++i) {
    const Candidate winner = block_best(best[i], shared.of_warp);
    if (threadIdx.x == 0) {
      float corner[4] = {-2.0f * kLogitLimit, -2.0f * kLogitLimit, -2.0f * kLogitLimit,
                         -2.0f * kLogitLimit};
      if (winner.index < problem.num_classes) {
        corners.read(winner.index, corner);
      }
      shared.dominators[group][i] = make_dominator(corner, winner.index, slack);
    }
  }
  __syncthreads();
}

__device__ bool stays(const Problem& problem, const Corners& corners, int c,
                      const SharedCell& shared) {
  const int group = group_of(problem, c);
  float corner[4];
  corners.read(c, corner);
  bool dominated = false;
  for (int i = 0; i < kDominators && !dominated; ++i) {
    dominated = is_dominated(corner, c, shared.dominators[group][i]);
  }
  return !dominated;
}

// Fills shared.stay and shared.before; returns how many classes stay.
__device__ int prune(const Problem& problem, const Corners& corners, SharedCell& shared) {
  const int num_words = (problem.num_classes + 31) / 32;
  for (int word = threadIdx.x / 32; word < num_words; word += kWarps) {
    const int c = 32 * word + threadIdx.x % 32;
    const bool stay = c < problem.num_classes && stays(problem, corners, c, shared);
    const unsigned bits = __ballot_sync(kFullWarp, stay);
    if (threadIdx.x % 32 == 0) {
      shared.stay[word] = bits;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int count = 0;
    for (int word = 0; word < num_words; ++word) {
      shared.before[word] = count;
      count += __popc(shared.stay[word]);
    }
    shared.of_warp[0].index = count;
  }
  __syncthreads();
  return shared.of_warp[0].index;
}

// Lays survivors [first, first + kShared) out in shared memory, in class order.
__device__ void load_survivors(const Problem& problem, const Corners& corners, int first,
                               SharedCell& shared) {
  __syncthreads();
  const int num_words = (problem.num_classes + 31) / 32;
  for (int word = threadIdx.x / 32; word < num_words; word += kWarps) {
    const int lane = threadIdx.x % 32;
    const std::uint32_t bits = shared.stay[word];
    const int slot = shared.before[word] + __popc(bits & ((1u << lane) - 1u)) - first;
    if ((bits >> lane & 1u) != 0 && slot >= 0 && slot < kShared) {
      shared.index[slot] = 32 * word + lane;
      corners.read(32 * word + lane, shared.corner[slot]);
    }
  }
  __syncthreads();
}

// Labels one pixel a thread. All threads of the block call it together; `active` ones write.
template <typename Label>
__device__ void label_pixel(const Problem& problem, const Corners& corners, int num_survivors,
                            int y, int x, bool active, std::int64_t image, Label* labels,
                            SharedCell& shared) {
  const float ty = cell_position(y, problem.in_height, problem.out_height).t;
  const float tx = cell_position(x, problem.in_width, problem.out_width).t;
  const float sy = 1.0f - ty, sx = 1.0f - tx;
  Best best[2] = {{kAbsentLogit, kNoClass}, {kAbsentLogit, kNoClass}};
  float denominator = 0.0f;
  for (int pass = 0; pass < (problem.needs_denominator ? 2 : 1); ++pass) {
    const float peak = best[0].logit > best[1].logit ? best[0].logit : best[1].logit;
    for (int first = 0; first < num_survivors; first += kShared) {
      if (num_survivors > kShared) {
        load_survivors(problem, corners, first, shared);
      }
      const int left = num_survivors - first;
      for (int i = 0; i < (left < kShared ? left : kShared); ++i) {
        const float logit = bilinear(shared.corner[i], sy, ty, sx, tx);
        if (pass == 0) {
          take_better(best[group_of(problem, shared.index[i])], logit, shared.index[i]);
        } else {
          denominator += expf(logit - peak);
        }
      }
    }
  }
  if (!active) {
    return;
  }
  const Winner winner =
      pick_winner(best[0], best[1], problem.activation, problem.seen_bias, denominator);
  const std::int64_t pixel = image + std::int64_t{y} * problem.out_width + x;
  int label = winner.score < problem.unknown_below ? kNoClass : winner.index;
  if (problem.label_table != nullptr && label != kNoClass) {
    label = static_cast<const Label*>(problem.label_table)[label];
  }
  labels[pixel] = static_cast<Label>(label);
  if (problem.scores != nullptr) {
    problem.scores[pixel] = winner.score;
  }
}

// One block a slice of a cell: blockIdx.x over columns, .y over rows times slices, .z over images.
template <typename Label>
__global__ void __launch_bounds__(kThreads)
    label_kernel(Problem problem, Label* __restrict__ labels) {  // [batch, out_height, out_width]
  __shared__ SharedCell shared;
  if (problem.valid_classes != nullptr) {
    const int valid = *problem.valid_classes;
    problem.num_classes = valid < 0 ? 0 : (valid < problem.stride ? valid : problem.stride);
  }
  const int cell_row = blockIdx.y / problem.slices, slice = blockIdx.y % problem.slices;
  const int cell_column = blockIdx.x;
  const int top = cell_begin(cell_row, problem.in_height, problem.out_height);
  const int height = cell_begin(cell_row + 1, problem.in_height, problem.out_height) - top;
  const int left = cell_begin(cell_column, problem.in_width, problem.out_width);
  const int width = cell_begin(cell_column + 1, problem.in_width, problem.out_width) - left;
  const int row_begin = top + static_cast<int>(std::int64_t{height} * slice / problem.slices);
  const int row_end = top + static_cast<int>(std::int64_t{height} * (slice + 1) / problem.slices);
  const int num_pixels = (row_end - row_begin) * width;
  if (num_pixels == 0) {
    return;
  }
  const std::int64_t points = std::int64_t{problem.in_height} * problem.in_width;
  const std::int64_t point =
      blockIdx.z * points + std::int64_t{cell_row} * problem.in_width + cell_column;
  const int below = problem.in_height > 1 ? problem.in_width : 0;
  const int beside = problem.in_width > 1 ? 1 : 0;
  const std::int64_t step = problem.stride;
  const float* at = problem.vectors + point * step;
  const Corners corners = {
      {at, at + beside * step, at + below * step, at + (below + beside) * step}};
  const float slack = problem.needs_denominator ? kSoftmaxSlack : 0.0f;
  for (int group = 0; group < (problem.seen != nullptr ? 2 : 1); ++group) {
    find_dominators(problem, corners, group, slack, shared);
  }
  const int num_survivors = prune(problem, corners, shared);
  if (num_survivors <= kShared) {
    load_survivors(problem, corners, 0, shared);
  }
  const std::int64_t image = std::int64_t{blockIdx.z} * problem.out_height * problem.out_width;
  for (int first = 0; first < num_pixels; first += kThreads) {
    const int pixel = first + threadIdx.x;
    const bool active = pixel < num_pixels;
    const int clamped = active ? pixel : num_pixels - 1;
    label_pixel(problem, corners, num_survivors, row_begin + clamped / width,
                left + clamped % width, active, image, labels, shared);
  }
}

template <typename T>
void launch_gather(const TensorView& logits, float* vectors, cudaStream_t stream) {
  const int num_classes = static_cast<int>(logits.shape[1]);
  const int points = static_cast<int>(logits.shape[2] * logits.shape[3]);
  const dim3 grid((points + kTile - 1) / kTile, (num_classes + kTile - 1) / kTile,
                  static_cast<unsigned>(logits.shape[0]));
  launch("gather_kernel", gather_kernel<T>, {grid, dim3(kTile, 8)}, stream, logits.as<const T>(),
         vectors, num_classes, points);
}

// The flags on the device: the caller's, or unpacked into `storage` from host memory.
const std::uint8_t* seen_on_device(const TensorView* seen, std::uint8_t* storage,
                                   cudaStream_t stream) {
  if (seen == nullptr || seen->device.is_cuda()) {
    return seen == nullptr ? nullptr : seen->as<const std::uint8_t>();
  }
  SeenBits bits = {};
  const int num_classes = static_cast<int>(seen->shape[0]);
  for (int c = 0; c < num_classes; ++c) {
    bits.words[c / 32] |= static_cast<std::uint32_t>(seen->as<const bool>()[c]) << (c % 32);
  }
  launch("unpack_seen_kernel", unpack_seen_kernel,
         {(num_classes + kThreads - 1) / kThreads, kThreads}, stream, bits, storage, num_classes);
  return storage;
}

int cells(std::int64_t in_size) {
  return in_size > 1 ? static_cast<int>(in_size) - 1 : 1;
}

}  // namespace

void upsample_argmax_cuda(const UpsampleArgmaxInputs& inputs, const TensorView& labels,
                          const TensorView* scores, const TensorView& workspace,
                          const UpsampleArgmaxParams& params, StreamHandle stream_handle) {
  const TensorView& logits = inputs.logits;
  const DeviceGuard guard(logits.device.index);
  const cudaStream_t stream = to_stream(stream_handle);
  float* vectors = workspace.as<float>();
  ZSSEG_DISPATCH_FLOAT(logits.dtype, T, launch_gather<T>(logits, vectors, stream));
  Problem problem = {};
  problem.vectors = vectors;
  if (params.seen_bias != 0.0f) {
    problem.seen = seen_on_device(
        inputs.seen, reinterpret_cast<std::uint8_t*>(vectors + logits.count()), stream);
  }
  problem.scores = scores == nullptr ? nullptr : scores->as<float>();
  problem.num_classes = problem.stride = static_cast<int>(logits.shape[1]);
  if (inputs.label_table != nullptr) {
    problem.label_table = inputs.label_table->data;
  }
  if (inputs.num_classes != nullptr) {
    problem.valid_classes = inputs.num_classes->as<const std::int32_t>();
  }
  problem.in_height = static_cast<int>(logits.shape[2]);
  problem.in_width = static_cast<int>(logits.shape[3]);
  problem.out_height = static_cast<int>(params.height);
  problem.out_width = static_cast<int>(params.width);
  problem.cell_rows = cells(logits.shape[2]);
  problem.cell_columns = cells(logits.shape[3]);
  // The outermost cells are half as large again as the others; alone, a cell is the whole image.
  const std::int64_t cell_pixels =
      (params.height / problem.cell_rows + 1) * (params.width / problem.cell_columns + 1) * 2;
  const std::int64_t most_slices = 65535 / problem.cell_rows;
  const std::int64_t slices = (cell_pixels + kMaxPixels - 1) / kMaxPixels;
  problem.slices = static_cast<int>(slices < most_slices ? slices : most_slices);
  problem.activation = params.activation;
  problem.seen_bias = params.seen_bias;
  problem.unknown_below = params.unknown_below;
  problem.needs_denominator =
      params.activation == Activation::kSoftmax &&
      (scores != nullptr || params.unknown_below > -INFINITY || problem.seen != nullptr);
  const dim3 grid(problem.cell_columns, problem.cell_rows * problem.slices,
                  static_cast<unsigned>(logits.shape[0]));
  ZSSEG_DISPATCH_LABEL(labels.dtype, Label,
                       launch("label_kernel", label_kernel<Label>, {grid, kThreads}, stream,
                              problem, labels.as<Label>()));
}

}  // namespace zsseg
