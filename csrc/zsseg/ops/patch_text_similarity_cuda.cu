// patch_text_similarity on CUDA, in one launch: products, norms, scale and whether all is finite.
//
// Bytes: both inputs once and the result once, for 1024 patches, 171 classes and depth 512 3.1 MB
// in float32 and 1.9 MB in float16 or bfloat16. Operations: 2 * patches * classes * depth = 0.18 G.
// Floors of that size on an H200 (4.8 TB/s; 67 T float32 and 990 T half operations a second): 0.7
// and 0.4 us by bytes, 2.7 and 0.2 us by operations; on an Orin AGX (205 GB/s; 5.3 and 43 T): 15
// and 9 us by bytes, 34 and 4 us by operations. For 20 classes, where blocks may share the depth,
// 2.2 and 1.2 MB and 0.02 G: 0.5 and 0.2 us by bytes, 0.3 and 0.02 us by operations on an H200; 11
// and 6 us by bytes, 4 and 0.5 us by operations on an Orin AGX. sm_75 has no matrix units for
// bfloat16: there it is widened to float32.
#include <cstdint>

#include "zsseg/cuda_launch.h"
#include "zsseg/cuda_raii.h"
#include "zsseg/dtype_dispatch.h"
#include "zsseg/ops/all_finite.h"
#include "zsseg/ops/depth_parts_cuda.h"
#include "zsseg/ops/dot_tile_cuda.h"
#include "zsseg/ops/finite_vote_cuda.h"
#include "zsseg/ops/patch_text_similarity.h"
#include "zsseg/ops/patch_text_similarity_element.h"

namespace zsseg {
namespace {

template <typename Patch, typename Text>
struct Problem {
  const Patch* patches;  // [batch, num_patches, depth]
  const Text* text;      // [num_classes, depth], text_stride elements further for the next image
  float* out;            // element (class, patch) at class * class_step + patch * patch_step
  std::uint8_t* finite;  // [1] or null
  int* votes;            // [2], zeros: blocks that are done, blocks that found NaN or infinity
  std::int64_t batch, num_classes, num_patches, depth, text_stride, class_step, patch_step;
  float scale;
  bool normalize, wide;
  DepthParts parts;
};

// The squares of one half of one line of a slab; threads beyond two a line have none.
template <typename Tile, typename Product>
__device__ float sum_of_squares(const unsigned char* rows, const unsigned char* columns) {
  constexpr int kLines = Tile::kRows + Tile::kColumns, kHalf = Product::kDepth / 2;
  const int line = threadIdx.x % kLines, first = threadIdx.x / kLines * kHalf;
  float sum = 0.0f;
  if (first < Product::kDepth) {
    ZSSEG_UNROLL()
    for (int k = 0; k < kHalf; k += 4) {
      float values[4];
      if (line < Tile::kRows) {
        read_four<typename Product::Row>(rows + line * Product::kRowPitch, first + k, values);
      } else {
        read_four<typename Product::Column>(columns + (line - Tile::kRows) * Product::kColumnPitch,
                                            first + k, values);
      }
      sum += values[0] * values[0] + values[1] * values[1] + values[2] * values[2] +
             values[3] * values[3];
    }
  }
  return sum;
}

// Puts the lines' sums of squares behind the partial sums.
template <typename Tile>
__device__ float* line_squares(float squares) {
  constexpr int kLines = Tile::kRows + Tile::kColumns;
  float* of_lines = PartialSums<Tile>::values() + PartialSums<Tile>::kCount;
  if (threadIdx.x < 2 * kLines) {
    of_lines[threadIdx.x] = squares;
  }
  __syncthreads();
  if (threadIdx.x < kLines) {
    of_lines[threadIdx.x] += of_lines[kLines + threadIdx.x];
  }
  return of_lines;  // this thread's; the others' after a barrier
}

// Turns them into factors.
template <typename Tile>
__device__ void make_factors(float* of_lines, bool normalize) {
  if (threadIdx.x < Tile::kRows + Tile::kColumns) {
    of_lines[threadIdx.x] = normalize ? inverse_norm(of_lines[threadIdx.x]) : 1.0f;
  }
  __syncthreads();
}

// Returns whether what this thread wrote is finite.
template <typename Tile, typename Problem>
__device__ bool write_tile(const Problem& problem, std::int64_t image, const float* factors) {
  const std::int64_t first_class = std::int64_t{blockIdx.y} * Tile::kRows;
  const std::int64_t first_patch = std::int64_t{blockIdx.x} * Tile::kColumns;
  const bool classes_last = problem.class_step == 1;
  bool finite = true;
  for (int index = threadIdx.x; index < Tile::kRows * Tile::kColumns; index += Tile::kThreads) {
    const int row = classes_last ? index % Tile::kRows : index / Tile::kColumns;
    const int column = classes_last ? index / Tile::kRows : index % Tile::kColumns;
    const std::int64_t c = first_class + row, patch = first_patch + column;
    if (c < problem.num_classes && patch < problem.num_patches) {
      const float value = PartialSums<Tile>::total(row, column) *
                          (problem.scale * factors[row] * factors[Tile::kRows + column]);
      finite = finite && is_finite(value);
      problem.out[image * problem.num_classes * problem.num_patches + c * problem.class_step +
                  patch * problem.patch_step] = value;
    }
  }
  return finite;
}

// Blocks at least on a multiprocessor. Six of small tiles leave each thread 80 registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
#define ZSSEG_RESIDENT_PARTS 4  // 80 registers would not hold the float32 product there
#else
#define ZSSEG_RESIDENT_PARTS 6
#endif

// Three of large tiles leave each thread 80, by matrix units; sm_75 needs some more.
#if ZSSEG_PTX_SM75
#define ZSSEG_RESIDENT_LARGE 2
#else
#define ZSSEG_RESIDENT_LARGE 3
#endif

template <typename Tile, bool kUnits>
constexpr int kResident = Tile::kSplits ? ZSSEG_RESIDENT_PARTS
                          : kUnits      ? ZSSEG_RESIDENT_LARGE
                                        : Tile::kResident;

// One block a tile of classes by patches of one image; the norms come from the same slabs as the
// products. Caller guarantees: contiguous arrays, no empty result.
template <typename Patch, typename Text, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, (kResident<Tile, kByMatrixUnits<Text, Patch>>))
    patch_text_similarity_kernel(Problem<Patch, Text> problem) {
  using Product = ProductOf<Tile, Text, Patch, false>;
  constexpr bool kUnits = kByMatrixUnits<Text, Patch>;
  constexpr int kDepth = Product::kDepth, kRowBytes = Tile::kRows * Product::kRowPitch;
  const std::int64_t first_class = std::int64_t{blockIdx.y} * Tile::kRows;
  const std::int64_t first_patch = std::int64_t{blockIdx.x} * Tile::kColumns;
  const DepthParts& parts = problem.parts;
  const auto slabs = static_cast<int>((problem.depth + kDepth - 1) / kDepth);
  const int first_slab = parts.first_of(slabs, parts.own());
  bool finite = true;
  for (std::int64_t image = parts.image(); image < problem.batch; image += parts.image_step()) {
    const Text* text = problem.text + image * problem.text_stride;
    const Patch* patches = problem.patches + image * problem.num_patches * problem.depth;
    using Rows = HoistedLines<Tile, Tile::kRows, kDepth, Text>;
    using Columns = HoistedLines<Tile, Tile::kColumns, kDepth, Patch>;
    const std::conditional_t<kUnits, Rows, NoLines> rows(
        text + first_class * problem.depth, problem.depth, problem.num_classes - first_class);
    const std::conditional_t<kUnits, Columns, NoLines> columns(
        patches + first_patch * problem.depth, problem.depth, problem.num_patches - first_patch);
    const auto load = [&](int slab, unsigned char* stage) {
      const std::int64_t start = (std::int64_t{first_slab} + slab) * kDepth;
      if constexpr (kUnits) {
        rows.load(stage, start, problem.depth - start, problem.wide);
        columns.load(stage + kRowBytes, start, problem.depth - start, problem.wide);
        return;
      }
      load_lines<Tile, Tile::kRows, kDepth, Text>(
          stage,
          [&](int line) {
            const std::int64_t index = first_class + line;
            return index < problem.num_classes ? text + index * problem.depth + start : nullptr;
          },
          problem.depth - start, problem.wide);
      load_lines<Tile, Tile::kColumns, kDepth, Patch>(
          stage + kRowBytes,
          [&](int line) {
            const std::int64_t index = first_patch + line;
            return index < problem.num_patches ? patches + index * problem.depth + start : nullptr;
          },
          problem.depth - start, problem.wide);
    };
    Product product;
    float squares = 0.0f;
    go_through_slabs<Tile>(parts.first_of(slabs, parts.own() + 1) - first_slab, load,
                           [&](const unsigned char* stage) {
                             product.add(stage, stage + kRowBytes);
                             if (problem.normalize) {
                               squares += sum_of_squares<Tile, Product>(stage, stage + kRowBytes);
                             }
                           });
    PartialSums<Tile>::put(product);
    float* factors = line_squares<Tile>(squares);
    if (!call_add_parts<Tile>(parts, factors)) {
      return;
    }
    make_factors<Tile>(factors, problem.normalize);
    finite = write_tile<Tile>(problem, image, factors) && finite;
    __syncthreads();
  }
  if (problem.finite != nullptr) {
    vote(problem.finite, problem.votes,
         static_cast<int>(gridDim.x * gridDim.y * gridDim.z) / parts.count, finite);
  }
}

template <typename Patch, typename Text, typename Tile>
void launch_tiles(Problem<Patch, Text> problem, const TensorView& workspace, StreamHandle stream) {
  // A GPU without matrix units for the type has more slabs, each less deep.
  constexpr int kDepth = ProductOf<Tile, Text, Patch, false>::kDepth;
  dim3 grid = tile_grid<Tile>(problem.num_classes, problem.num_patches, problem.batch);
  problem.parts = depth_parts<Tile>(workspace, grid, (problem.depth + kDepth - 1) / kDepth);
  grid.z *= static_cast<unsigned>(problem.parts.count);
  launch("patch_text_similarity_kernel", patch_text_similarity_kernel<Patch, Text, Tile>,
         {grid, Tile::kThreads}, to_stream(stream), problem);
}

template <typename Patch, typename Text>
void similarity(const TensorView& patch_embeds, const TensorView& text_embeds,
                const PatchTextSimilarityOutputs& outputs, const PatchTextSimilarityParams& params,
                StreamHandle stream) {
  Problem<Patch, Text> problem = {};
  problem.patches = patch_embeds.as<const Patch>();
  problem.text = text_embeds.as<const Text>();
  problem.out = outputs.out.as<float>();
  problem.finite = outputs.check.finite.as<std::uint8_t>();
  problem.votes = outputs.check.workspace.as<int>();
  problem.batch = patch_embeds.shape[0];
  problem.num_patches = patch_embeds.shape[1];
  problem.depth = patch_embeds.shape[2];
  problem.num_classes = text_embeds.shape[text_embeds.shape.rank - 2];
  problem.text_stride = text_embeds.shape.rank == 3 ? problem.num_classes * problem.depth : 0;
  problem.class_step = params.classes_last ? 1 : problem.num_patches;
  problem.patch_step = params.classes_last ? problem.num_classes : 1;
  problem.scale = static_cast<float>(params.logit_scale);
  problem.normalize = params.normalize;
  const auto depth_bytes = problem.depth * static_cast<std::int64_t>(sizeof(Patch));
  const auto text_bytes = problem.depth * static_cast<std::int64_t>(sizeof(Text));
  problem.wide = is_wide(problem.patches, depth_bytes) && is_wide(problem.text, text_bytes);
  if (fits_large_tiles(problem.num_classes, problem.num_patches, problem.batch)) {
    launch_tiles<Patch, Text, LargeTile>(problem, outputs.check.workspace, stream);
  } else {
    launch_tiles<Patch, Text, SmallTile>(problem, outputs.check.workspace, stream);
  }
}

}  // namespace

void patch_text_similarity_cuda(const TensorView& patch_embeds, const TensorView& text_embeds,
                                const PatchTextSimilarityOutputs& outputs,
                                const PatchTextSimilarityParams& params, StreamHandle stream) {
  const DeviceGuard guard(outputs.out.device.index);
  ZSSEG_DISPATCH_SIMILARITY(
      patch_embeds.dtype, text_embeds.dtype,
      (similarity<Patch, Text>(patch_embeds, text_embeds, outputs, params, stream)));
}

}  // namespace zsseg
