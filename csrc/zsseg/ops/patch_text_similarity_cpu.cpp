#include <cstdint>

#include "zsseg/dtype_dispatch.h"
#include "zsseg/ops/dot_tile.h"
#include "zsseg/ops/patch_text_similarity.h"
#include "zsseg/ops/patch_text_similarity_element.h"
#include "zsseg/thread_pool.h"

namespace zsseg {
namespace ZSSEG_ISA_NAMESPACE {
namespace {

constexpr int kBlockPatches = 64;
// With the patches of one tile, this many class rows of 512 floats fill a 32 KiB first-level cache.
constexpr int kChunkClasses = 4 * kTileRows;
constexpr std::int64_t kGrainMultiplications = 1 << 20;  // about 50 us of work

template <typename Element>
float row_factor(const Element* row, std::int64_t depth, bool normalize) {
  if (!normalize) {
    return 1.0f;
  }
  Vector squares = {};
  std::int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    const Vector values = load_vector(row + k);
    squares += values * values;
  }
  float sum = sum_of_lanes(squares);
  for (; k < depth; ++k) {
    const float value = load_scalar(row + k);
    sum += value * value;
  }
  return inverse_norm(sum);
}

template <typename Patch, typename Text>
struct Problem {
  const Patch* patches;  // [num_patches, depth]
  const Text* text;      // [num_classes, depth]
  float* out;            // [num_classes, num_patches]
  std::int64_t num_patches;
  std::int64_t num_classes;
  std::int64_t depth;
  float scale;
  bool normalize;
};

// kTileRows classes by kTileColumns patches. Rows past the end repeat the last one and are dropped.
template <typename Patch, typename Text>
void similarity_tile(const Problem<Patch, Text>& problem, std::int64_t first_class,
                     std::int64_t first_patch, const float* class_factors,
                     const float* patch_factors) {
  PlainRow<Text> rows[kTileRows];
  PlainRow<Patch> columns[kTileColumns];
  for (int row = 0; row < kTileRows; ++row) {
    rows[row].data =
        problem.text + smaller(first_class + row, problem.num_classes - 1) * problem.depth;
  }
  for (int column = 0; column < kTileColumns; ++column) {
    columns[column].data =
        problem.patches + smaller(first_patch + column, problem.num_patches - 1) * problem.depth;
  }
  float sums[kTileRows][kTileColumns] = {};
  add_dot_tile(rows, columns, problem.depth, sums);
  const std::int64_t num_rows = smaller(kTileRows, problem.num_classes - first_class);
  const std::int64_t num_columns = smaller(kTileColumns, problem.num_patches - first_patch);
  for (std::int64_t row = 0; row < num_rows; ++row) {
    float* out = problem.out + (first_class + row) * problem.num_patches + first_patch;
    for (std::int64_t column = 0; column < num_columns; ++column) {
      out[column] = sums[row][column] * (class_factors[row] * patch_factors[column]);
    }
  }
}

template <typename Patch, typename Text>
void similarity_block(const Problem<Patch, Text>& problem, std::int64_t first_patch) {
  const std::int64_t end_patch = smaller(first_patch + kBlockPatches, problem.num_patches);
  float patch_factors[kBlockPatches];
  for (std::int64_t patch = first_patch; patch < end_patch; ++patch) {
    patch_factors[patch - first_patch] =
        row_factor(problem.patches + patch * problem.depth, problem.depth, problem.normalize);
  }
  for (std::int64_t chunk = 0; chunk < problem.num_classes; chunk += kChunkClasses) {
    const std::int64_t end_class = smaller(chunk + kChunkClasses, problem.num_classes);
    float class_factors[kChunkClasses];
    for (std::int64_t row = chunk; row < end_class; ++row) {
      class_factors[row - chunk] = problem.scale * row_factor(problem.text + row * problem.depth,
                                                              problem.depth, problem.normalize);
    }
    for (std::int64_t patch = first_patch; patch < end_patch; patch += kTileColumns) {
      for (std::int64_t row = chunk; row < end_class; row += kTileRows) {
        similarity_tile(problem, row, patch, class_factors + (row - chunk),
                        patch_factors + (patch - first_patch));
      }
    }
  }
}

template <typename Patch, typename Text>
void similarity(const TensorView& patch_embeds, const TensorView& text_embeds,
                const TensorView& out, const PatchTextSimilarityParams& params) {
  const Problem<Patch, Text> first{patch_embeds.as<const Patch>(),
                                   text_embeds.as<const Text>(),
                                   out.as<float>(),
                                   out.shape[2],
                                   out.shape[1],
                                   patch_embeds.shape[2],
                                   static_cast<float>(params.logit_scale),
                                   params.normalize};
  const std::int64_t text_stride =
      text_embeds.shape.rank == 3 ? first.num_classes * first.depth : 0;
  const std::int64_t num_blocks = (first.num_patches + kBlockPatches - 1) / kBlockPatches;
  const std::int64_t block_work = larger(1, kBlockPatches * first.num_classes * first.depth);
  parallel_for(0, out.shape[0] * num_blocks, kGrainMultiplications / block_work + 1,
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t index = begin; index < end; ++index) {
                   const std::int64_t image = index / num_blocks;
                   Problem<Patch, Text> problem = first;
                   problem.patches += image * first.num_patches * first.depth;
                   problem.text += image * text_stride;
                   problem.out += image * first.num_classes * first.num_patches;
                   similarity_block(problem, index % num_blocks * kBlockPatches);
                 }
               });
}

}  // namespace

void patch_text_similarity_cpu(const TensorView& patch_embeds, const TensorView& text_embeds,
                               const TensorView& out, const PatchTextSimilarityParams& params) {
  ZSSEG_DISPATCH_FLOAT(
      patch_embeds.dtype, Patch,
      ZSSEG_DISPATCH_FLOAT(text_embeds.dtype, Text,
                           similarity<Patch, Text>(patch_embeds, text_embeds, out, params)));
}

}  // namespace ZSSEG_ISA_NAMESPACE
}  // namespace zsseg
