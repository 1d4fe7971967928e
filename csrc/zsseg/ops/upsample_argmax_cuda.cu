// upsample_argmax on CUDA in one launch, without ever holding [classes, out_height, out_width].
//
// A warp labels one cell of the grid, or a slice of its rows; a block has kWarps cells side by
// side.
// 1. The block lays the logits of its 2 x (kWarps + 1) grid points out in shared memory, kChunk
//    classes at a time, made finite.
// 2. A warp's lanes look over the classes for those able to push others out, and keep a bit for
//    every class that these do not dominate in the warp's cell.
// 3. What stays is laid out kWindow classes at a time. Then a lane takes four pixels of a row at
//    once; a cell that one class is left of is filled.
//
// Bytes: logits are read 2 * (1 + 1 / kWarps) times, from L2 but for the first; labels (and scores)
// are written once. 171 x 32 x 32 float32 -> 512 x 512: 0.7 MB read, 1.8 MB from L2, 0.3 MB
// written. Operations: about 45 a class and cell to choose, 8 a pixel and class that stays. Floors:
// 0.2 us by bytes, 0.5 us by operations on an H200 (4.8 TB/s, 33 T/s), 5 and 7 us on an Orin AGX
// (205 GB/s, 2.7 T/s), with five classes left a cell.
#include <cstdint>

#include "zsseg/cuda_launch.h"
#include "zsseg/cuda_raii.h"
#include "zsseg/ops/upsample_argmax.h"
#include "zsseg/ops/upsample_argmax_block_cuda.h"
#include "zsseg/ops/upsample_argmax_paint_cuda.h"
#include "zsseg/wide_cuda.h"

namespace zsseg {
namespace {

using namespace zsseg::upsample;

constexpr int kPixels =
    1024;  // a warp's share of a cell: enough to pay for looking the classes over

// Pixels of a row that a lane takes at once: fewer where more is kept of each.
template <int kGroups, int kActivation>
constexpr int kRun = kGroups == 2 && kActivation == static_cast<int>(Activation::kSoftmax) ? 2 : 4;

// How far the pixels of a run lie beyond the cell's left grid points: t, and s = 1 - t.
template <int kCount>
struct Fractions {
  float s[kCount], t[kCount];
};

// Stores what lies in the cell of a run from column `x` on, at once if that is all and aligned.
template <typename T, int kCount>
__device__ void store_run(T* to, const Wide<T, kCount>& run, const WarpCell& cell, int x,
                          bool aligned) {
  if (aligned && x >= cell.column_begin && x + kCount <= cell.column_end) {
    *reinterpret_cast<Wide<T, kCount>*>(to) = run;
    return;
  }
  for (int p = 0; p < kCount; ++p) {
    if (x + p >= cell.column_begin && x + p < cell.column_end) {
      to[p] = run.value[p];
    }
  }
}

template <typename Label, typename Paint, int kCount>
__device__ void store_labels(const Problem& problem, const Paint& paint, const WarpCell& cell,
                             int x, std::int64_t at, const Winner (&winner)[kCount]) {
  Wide<Label, kCount> labels;
  for (int p = 0; p < kCount; ++p) {
    int label = winner[p].score < problem.unknown_below ? kNoClass : winner[p].index;
    if (problem.label_table != nullptr && label != kNoClass) {
      label = static_cast<const Label*>(problem.label_table)[label];
    }
    labels.value[p] = static_cast<Label>(label);
  }
  store_run(static_cast<Label*>(problem.labels) + at, labels, cell, x, problem.aligned);
  paint_run(paint, labels, cell, x, at);
}

// Labels and, if wanted, scores of the pixels from column `x` and number `at` of the result on.
template <typename Paint, int kCount>
__device__ void store_pixels(const Problem& problem, const Paint& paint, const WarpCell& cell,
                             int x, std::int64_t at, const Winner (&winner)[kCount]) {
  if (problem.wide_labels) {
    store_labels<std::uint16_t>(problem, paint, cell, x, at, winner);
  } else {
    store_labels<std::uint8_t>(problem, paint, cell, x, at, winner);
  }
  if (problem.scores != nullptr) {
    Wide<float, kCount> scores;
    for (int p = 0; p < kCount; ++p) {
      scores.value[p] = winner[p].score;
    }
    store_run(problem.scores + at, scores, cell, x, problem.aligned);
  }
}

// Keeps the first of equals.
template <int kCount>
__device__ void challenge(Best (&rivals)[kCount], const float (&logits)[kCount], int c) {
  for (int p = 0; p < kCount; ++p) {
    if (logits[p] > rivals[p].logit) {
      rivals[p] = {logits[p], c};
    }
  }
}

// Labels a run of pixels whose row lies `ty` beyond the cell's upper grid points.
template <int kGroups, int kActivation, int kCount>
__device__ void label_run(const Problem& problem, Survivors<kGroups>& survivors, float ty,
                          const Fractions<kCount>& columns, Winner (&winner)[kCount]) {
  const float sy = 1.0f - ty;
  Best best[kGroups][kCount];
  float denominator[kCount];
  for (int p = 0; p < kCount; ++p) {
    denominator[p] = 0.0f;
    for (int group = 0; group < kGroups; ++group) {
      best[group][p] = {kAbsentLogit, kNoClass};
    }
  }
  const auto logits_of = [&](const Corners& corners, float (&logits)[kCount]) {
    const float left = mix(sy, corners.value[0], ty, corners.value[2]);
    const float right = mix(sy, corners.value[1], ty, corners.value[3]);
    for (int p = 0; p < kCount; ++p) {
      logits[p] = mix(columns.s[p], left, columns.t[p], right);
    }
  };
  survivors.for_each([&](const Corners& corners, int survivor) {
    float logits[kCount];
    logits_of(corners, logits);
    if (kGroups == 2 && survivor >= kSeenBit) {  // the same in all lanes
      challenge(best[kGroups - 1], logits, survivor - kSeenBit);
    } else {
      challenge(best[0], logits, survivor);
    }
  });
  if (kActivation == static_cast<int>(Activation::kSoftmax)) {
    survivors.for_each([&](const Corners& corners, int) {
      float logits[kCount];
      logits_of(corners, logits);
      for (int p = 0; p < kCount; ++p) {
        const float first = best[0][p].logit, second = best[kGroups - 1][p].logit;
        denominator[p] += expf(logits[p] - (first > second ? first : second));
      }
    });
  }
  for (int p = 0; p < kCount; ++p) {
    const Best none = {kAbsentLogit, kNoClass};
    winner[p] = pick_winner(best[0][p], kGroups == 2 ? best[kGroups - 1][p] : none,
                            static_cast<Activation>(kActivation),
                            kGroups == 2 ? problem.seen_bias : 0.0f, denominator[p]);
  }
}

// Of the block's image.
__device__ std::int64_t first_pixel(const Problem& problem) {
  return blockIdx.z * (std::int64_t{problem.out_height} * problem.out_width);
}

// Labels the warp's pixels: lanes over the runs of a row, and over rows where a row has few.
template <int kGroups, int kActivation, typename Paint>
__device__ void label_cell(const Problem& problem, const Paint& paint,
                           Survivors<kGroups>& survivors) {
  constexpr int kCount = kRun<kGroups, kActivation>;
  const WarpCell& cell = survivors.cell();
  const int only = problem.needs_scores ? -1 : survivors.only_one();
  const int num_runs = (cell.column_end + kCount - 1) / kCount - cell.column_begin / kCount;
  for (int first = 0; first < num_runs; first += 32) {
    const int across = num_runs - first < 32 ? num_runs - first : 32;
    const int rows = 32 / across, lane_row = cell.lane() / across;
    const int x = kCount * (cell.column_begin / kCount + first + cell.lane() % across);
    Fractions<kCount> columns;
    for (int p = 0; p < kCount; ++p) {
      const int column = x + p < problem.out_width ? x + p : problem.out_width - 1;
      columns.t[p] = fraction_in_cell(column, cell.cell_column, problem.columns);
      columns.s[p] = 1.0f - columns.t[p];
    }
    for (int y = cell.row_begin + lane_row; y - lane_row < cell.row_end; y += rows) {
      Winner winner[kCount];
      for (Winner& pixel : winner) {
        pixel = {0.0f, only};
      }
      if (only < 0) {
        const int row = y < problem.out_height ? y : problem.out_height - 1;
        const float ty = fraction_in_cell(row, cell.cell_row, problem.rows);
        label_run<kGroups, kActivation>(problem, survivors, ty, columns, winner);
      }
      if (lane_row < rows && y < cell.row_end) {
        const std::int64_t at = first_pixel(problem) + std::int64_t{y} * problem.out_width + x;
        store_pixels(problem, paint, cell, x, at, winner);
      }
    }
  }
}

__device__ void place(const Problem& problem, WarpCell& cell) {
  cell.num_classes = problem.num_classes;
  if (problem.valid_classes != nullptr) {
    const int valid = *problem.valid_classes;
    cell.num_classes = valid < 0 ? 0 : (valid < problem.num_classes ? valid : problem.num_classes);
  }
  cell.cell_row = blockIdx.y / problem.slices;
  cell.cell_column = blockIdx.x * kWarps + cell.warp();
  const unsigned slices = problem.slices, slice = blockIdx.y % slices;
  const int top = cell_begin(cell.cell_row, problem.rows);
  const unsigned height = cell_begin(cell.cell_row + 1, problem.rows) - top;
  cell.row_begin = top + static_cast<int>(height * slice / slices);
  cell.row_end = top + static_cast<int>(height * (slice + 1) / slices);
  cell.column_begin = cell_begin(cell.cell_column, problem.columns);
  cell.column_end = cell_begin(cell.cell_column + 1, problem.columns);
}

// Labels a block's cells: blockIdx.x over kWarps columns of cells, .y over rows of cells times
// slices, .z over images.
template <int kGroups, int kActivation, typename Paint>
__device__ void label_block(const Problem& problem, const Paint& paint,
                            SharedBlock<kGroups>& shared) {
  WarpShared<kGroups>& own = shared.warps[WarpCell::warp()];
  if (WarpCell::lane() == 0) {
    place(problem, own.cell);
  }
  __syncwarp();
  if (own.cell.row_begin >= own.cell.row_end) {
    return;  // the whole block
  }
  Staged staged(shared.tile);
  find_survivors(problem, staged, own);
  if (!own.cell.is_empty()) {
    Survivors<kGroups> survivors(problem, staged, own);
    label_cell<kGroups, kActivation>(problem, paint, survivors);
  }
}

template <int kGroups, int kActivation>
__global__ void __launch_bounds__(kThreads, 8) label_kernel(Problem problem) {
  __shared__ SharedBlock<kGroups> shared;
  label_block<kGroups, kActivation>(problem, NoPainting{}, shared);
}

// Drawing takes more registers than labelling alone; before sm_90, 72 are too few for two groups.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define ZSSEG_OVERLAY_BLOCKS (kGroups == 1 ? 7 : 6)
#else
#define ZSSEG_OVERLAY_BLOCKS 7
#endif

// The same, and the overlay of what it stores, which reads and writes three bytes a pixel more.
template <int kGroups, int kActivation>
__global__ void __launch_bounds__(kThreads, ZSSEG_OVERLAY_BLOCKS)
    label_overlay_kernel(Problem problem, Painting painting) {
  __shared__ SharedBlock<kGroups> shared;
  label_block<kGroups, kActivation>(problem, painting, shared);
}

void take_seen(const TensorView* seen, Problem& problem) {
  if (seen->device.is_cuda()) {
    problem.seen = seen->as<const std::uint8_t>();
    return;
  }
  for (std::int64_t c = 0; c < seen->shape[0]; ++c) {
    problem.seen_bits[c / 32] |= static_cast<std::uint32_t>(seen->as<const bool>()[c]) << (c % 32);
  }
}

int cells(std::int64_t in_size) {
  return in_size > 1 ? static_cast<int>(in_size) - 1 : 1;
}

// Into how many slices the rows of a cell are cut. The outermost cells are half as large again as
// the others; alone, a cell is the whole image.
int slices_of_cell(const UpsampleArgmaxParams& params, int cell_rows, int cell_columns) {
  const std::int64_t pixels = (params.height / cell_rows + 1) * (params.width / cell_columns + 1);
  const std::int64_t most = 65535 / cell_rows;
  const std::int64_t slices = (pixels + kPixels - 1) / kPixels;
  return static_cast<int>(slices < most ? slices : most);
}

Problem describe(const UpsampleArgmaxInputs& inputs, const TensorView& labels,
                 const TensorView* scores, const UpsampleArgmaxParams& params) {
  const TensorView& logits = inputs.logits;
  Problem problem = {};
  problem.logits = logits.data;
  problem.label_table = inputs.label_table == nullptr ? nullptr : inputs.label_table->data;
  problem.valid_classes =
      inputs.num_classes == nullptr ? nullptr : inputs.num_classes->as<const std::int32_t>();
  problem.labels = labels.data;
  problem.scores = scores == nullptr ? nullptr : scores->as<float>();
  problem.num_classes = static_cast<int>(logits.shape[1]);
  problem.in_height = static_cast<int>(logits.shape[2]);
  problem.in_width = static_cast<int>(logits.shape[3]);
  problem.out_height = static_cast<int>(params.height);
  problem.out_width = static_cast<int>(params.width);
  problem.cell_columns = cells(logits.shape[3]);
  problem.slices = slices_of_cell(params, cells(logits.shape[2]), problem.cell_columns);
  problem.rows = make_axis(problem.in_height, problem.out_height, params.align);
  problem.columns = make_axis(problem.in_width, problem.out_width, params.align);
  problem.seen_bias = params.seen_bias;
  problem.unknown_below = params.unknown_below;
  problem.is_half = logits.dtype == DType::float16;
  problem.is_bfloat16 = logits.dtype == DType::bfloat16;
  problem.wide_labels = labels.dtype == DType::uint16;
  problem.aligned = problem.out_width % 4 == 0 &&
                    is_aligned(labels.data, 4 * size_of(labels.dtype)) &&
                    is_aligned(problem.scores, 4 * sizeof(float));
  problem.needs_scores = scores != nullptr || params.unknown_below > -INFINITY;
  return problem;
}

Painting describe(const LabelOverlay& overlay, const Problem& problem) {
  Painting painting = {};
  painting.frame = overlay.frame.as<const std::uint8_t>();
  painting.palette = overlay.palette.as<const std::uint8_t>();
  painting.picture = overlay.picture.as<std::uint8_t>();
  painting.num_colours = overlay.palette.shape[0];
  painting.weight = overlay_weight(overlay.alpha);
  painting.aligned = problem.out_width % 4 == 0 && is_aligned(painting.frame, 4) &&
                     is_aligned(painting.picture, 4);
  return painting;
}

template <int kGroups, int kActivation>
void launch_kernel(const Problem& problem, const LabelOverlay* overlay, const LaunchShape& shape,
                   StreamHandle stream) {
  if (overlay == nullptr) {
    launch("label_kernel", label_kernel<kGroups, kActivation>, shape, to_stream(stream), problem);
  } else {
    launch("label_overlay_kernel", label_overlay_kernel<kGroups, kActivation>, shape,
           to_stream(stream), problem, describe(*overlay, problem));
  }
}

using Launch = void (*)(const Problem&, const LabelOverlay*, const LaunchShape&, StreamHandle);

template <int kGroups>
Launch launch_for(Activation activation) {
  switch (activation) {
    case Activation::kSigmoid:
      return launch_kernel<kGroups, static_cast<int>(Activation::kSigmoid)>;
    case Activation::kSoftmax:
      return launch_kernel<kGroups, static_cast<int>(Activation::kSoftmax)>;
    default:
      return launch_kernel<kGroups, static_cast<int>(Activation::kNone)>;
  }
}

}  // namespace

void upsample_argmax_cuda(const UpsampleArgmaxInputs& inputs, const TensorView& labels,
                          const TensorView* scores, const TensorView& /*workspace*/,
                          const UpsampleArgmaxParams& params, StreamHandle stream) {
  const DeviceGuard guard(labels.device.index);
  Problem problem = describe(inputs, labels, scores, params);
  const bool two_groups = inputs.seen != nullptr && params.seen_bias != 0.0f;
  if (two_groups) {
    take_seen(inputs.seen, problem);
  }
  // Activations rise with the logit: one group that nobody wants scores of needs none.
  const bool plain = !two_groups && !problem.needs_scores;
  const Activation activation = plain ? Activation::kNone : params.activation;
  problem.needs_denominator = activation == Activation::kSoftmax;
  const auto cell_rows = static_cast<unsigned>(cells(inputs.logits.shape[2]));
  const dim3 grid((problem.cell_columns + kWarps - 1) / kWarps, cell_rows * problem.slices,
                  static_cast<unsigned>(labels.shape[0]));
  const std::size_t stay_bytes = sizeof(std::uint32_t) * kWarps * ((problem.num_classes + 31) / 32);
  const Launch launch_it = two_groups ? launch_for<2>(activation) : launch_for<1>(activation);
  launch_it(problem, inputs.overlay, {grid, kThreads, stay_bytes}, stream);
}

}  // namespace zsseg
