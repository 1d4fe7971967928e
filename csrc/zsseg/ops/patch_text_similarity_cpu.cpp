#include <cstdint>

#include "zsseg/cpu_scratch.h"
#include "zsseg/dtype_dispatch.h"
#include "zsseg/ops/dot_tile.h"
#include "zsseg/ops/packed_product.h"
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
  float* out;            // element (class, patch) at class * class_step + patch * patch_step
  std::int64_t class_step, patch_step;
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
    float* out =
        problem.out + (first_class + row) * problem.class_step + first_patch * problem.patch_step;
    for (std::int64_t column = 0; column < num_columns; ++column) {
      out[column * problem.patch_step] =
          sums[row][column] * (class_factors[row] * patch_factors[column]);
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

// The factor of a class's sums.
template <typename Patch, typename Text>
float class_factor(const Problem<Patch, Text>& problem, std::int64_t index) {
  return problem.scale *
         row_factor(problem.text + index * problem.depth, problem.depth, problem.normalize);
}

// Packs the classes of one image behind their factors.
template <typename Patch, typename Text>
void pack_classes(const Problem<Patch, Text>& problem, float* factors, float* packed) {
  for (std::int64_t index = 0; index < problem.num_classes; ++index) {
    factors[index] = class_factor(problem, index);
  }
  pack_lines(
      [&](std::int64_t index) { return PlainRow<Text>{problem.text + index * problem.depth}; },
      problem.num_classes, 0, problem.depth, problem.depth, packed);
}

template <typename Patch, typename Text>
void packed_block(const Problem<Patch, Text>& problem, const float* class_factors,
                  const float* packed, std::int64_t first_patch) {
  const std::int64_t end_patch = smaller(first_patch + kPackedRows, problem.num_patches);
  float patch_factors[kPackedRows];
  for (std::int64_t patch = first_patch; patch < end_patch; ++patch) {
    patch_factors[patch - first_patch] =
        row_factor(problem.patches + patch * problem.depth, problem.depth, problem.normalize);
  }
  const PackedProduct<Patch> product{packed, problem.patches, problem.num_classes, problem.depth,
                                     problem.depth};
  multiply_packed(product, first_patch, end_patch, [&](const PackedSums& sums) {
    const float* of_patch = patch_factors + (sums.first_row - first_patch);
    for (std::int64_t c = 0; c < sums.num_lines; ++c) {
      const float of_class = class_factors[sums.first_line + c];
      float* out = problem.out + (sums.first_line + c) * problem.class_step +
                   sums.first_row * problem.patch_step;
      for (std::int64_t i = 0; i < sums.num_rows; ++i) {
        out[i * problem.patch_step] = sums.values[i * sums.pitch + c] * (of_class * of_patch[i]);
      }
    }
  });
}

// All images, each split into blocks of patches for the threads.
template <typename Patch, typename Text>
void all_images(const Problem<Patch, Text>& first, std::int64_t batch, std::int64_t text_stride) {
  const bool is_packed = first.num_classes >= kPackedFrom;
  const std::int64_t block_patches = is_packed ? kPackedRows : kBlockPatches;
  const std::int64_t num_blocks = (first.num_patches + block_patches - 1) / block_patches;
  const std::int64_t grain =
      kGrainMultiplications / larger(1, block_patches * first.num_classes * first.depth) + 1;
  const std::int64_t of_factors = packed_count(first.num_classes, 1);
  float* scratch = is_packed ? cpu_scratch(static_cast<std::size_t>(
                                   of_factors + packed_count(first.num_classes, first.depth)))
                             : nullptr;
  for (std::int64_t image = 0; image < batch; ++image) {
    Problem<Patch, Text> problem = first;
    problem.patches += image * first.num_patches * first.depth;
    problem.text += image * text_stride;
    problem.out += image * first.num_classes * first.num_patches;
    if (is_packed && (image == 0 || text_stride != 0)) {
      pack_classes(problem, scratch, scratch + of_factors);
    }
    parallel_for(0, num_blocks, grain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t block = begin; block < end; ++block) {
        if (is_packed) {
          packed_block(problem, scratch, scratch + of_factors, block * block_patches);
        } else {
          similarity_block(problem, block * block_patches);
        }
      }
    });
  }
}

template <typename Patch, typename Text>
void similarity(const TensorView& patch_embeds, const TensorView& text_embeds,
                const TensorView& out, const PatchTextSimilarityParams& params) {
  Problem<Patch, Text> problem = {};
  problem.patches = patch_embeds.as<const Patch>();
  problem.text = text_embeds.as<const Text>();
  problem.out = out.as<float>();
  problem.num_patches = patch_embeds.shape[1];
  problem.depth = patch_embeds.shape[2];
  problem.num_classes = text_embeds.shape[text_embeds.shape.rank - 2];
  problem.class_step = params.classes_last ? 1 : problem.num_patches;
  problem.patch_step = params.classes_last ? problem.num_classes : 1;
  problem.scale = static_cast<float>(params.logit_scale);
  problem.normalize = params.normalize;
  all_images(problem, patch_embeds.shape[0],
             text_embeds.shape.rank == 3 ? problem.num_classes * problem.depth : 0);
}

}  // namespace

void patch_text_similarity_cpu(const TensorView& patch_embeds, const TensorView& text_embeds,
                               const PatchTextSimilarityOutputs& outputs,
                               const PatchTextSimilarityParams& params) {
  ZSSEG_DISPATCH_SIMILARITY(
      patch_embeds.dtype, text_embeds.dtype,
      (similarity<Patch, Text>(patch_embeds, text_embeds, outputs.out, params)));
}

}  // namespace ZSSEG_ISA_NAMESPACE
}  // namespace zsseg
