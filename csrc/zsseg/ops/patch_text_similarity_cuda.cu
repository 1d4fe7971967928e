#include <algorithm>
#include <cstdint>

#include "zsseg/cuda_launch.h"
#include "zsseg/cuda_raii.h"
#include "zsseg/dtype_dispatch.h"
#include "zsseg/ops/dot_tile_cuda.h"
#include "zsseg/ops/patch_text_similarity.h"
#include "zsseg/ops/patch_text_similarity_element.h"

namespace zsseg {
namespace {

constexpr std::int64_t kMaxGridZ = 65535;

// One block a tile of 64 classes by 64 patches of one image; norms are summed from the same slabs
// as the products. Bound by arithmetic. Caller guarantees: contiguous arrays, no empty result.
template <typename Patch, typename Text>
__global__ void __launch_bounds__(kThreads)
    patch_text_similarity_kernel(const Patch* __restrict__ patch_embeds,  // [batch, patches, depth]
                                 const Text* __restrict__ text_embeds,  // [(batch,) classes, depth]
                                 float* __restrict__ out,               // [batch, classes, patches]
                                 std::int64_t batch, std::int64_t num_classes,
                                 std::int64_t num_patches, std::int64_t depth,
                                 std::int64_t text_stride, float scale, bool normalize) {
  __shared__ DotTileStorage storage;
  __shared__ float factors[2][kTile];  // of the tile's classes, then of its patches
  const std::int64_t first_class = static_cast<std::int64_t>(blockIdx.y) * kTile;
  const std::int64_t first_patch = static_cast<std::int64_t>(blockIdx.x) * kTile;
  for (std::int64_t image = blockIdx.z; image < batch; image += gridDim.z) {
    const Text* text = text_embeds + image * text_stride;
    const Patch* patches = patch_embeds + image * num_patches * depth;
    float sum_of_squares = 0.0f;
    float sums[kPerThread][kPerThread] = {};
    add_dot_tile(
        storage,
        [&](int line, std::int64_t k) {
          const std::int64_t index = first_class + line;
          return index < num_classes ? as_float(text[index * depth + k]) : 0.0f;
        },
        [&](int line, std::int64_t k) {
          const std::int64_t index = first_patch + line;
          return index < num_patches ? as_float(patches[index * depth + k]) : 0.0f;
        },
        depth,
        [&](const DotTileStorage& slab) {
          if (normalize && threadIdx.x < 2 * kTile) {
            const int line = threadIdx.x % kTile;
            for (int k = 0; k < kSlab; ++k) {
              const float value = threadIdx.x < kTile ? slab.rows[k][line] : slab.columns[k][line];
              sum_of_squares += value * value;
            }
          }
        },
        sums);
    if (threadIdx.x < 2 * kTile) {
      factors[threadIdx.x / kTile][threadIdx.x % kTile] =
          normalize ? inverse_norm(sum_of_squares) : 1.0f;
    }
    __syncthreads();
    for (int i = 0; i < kPerThread; ++i) {
      for (int j = 0; j < kPerThread; ++j) {
        const int row = threadIdx.x / 16 + 16 * i;
        const int column = threadIdx.x % 16 + 16 * j;
        if (first_class + row < num_classes && first_patch + column < num_patches) {
          out[(image * num_classes + first_class + row) * num_patches + first_patch + column] =
              sums[i][j] * (scale * factors[0][row] * factors[1][column]);
        }
      }
    }
    __syncthreads();
  }
}

unsigned tiles(std::int64_t count) {
  return static_cast<unsigned>((count + kTile - 1) / kTile);
}

}  // namespace

void patch_text_similarity_cuda(const TensorView& patch_embeds, const TensorView& text_embeds,
                                const TensorView& out, const PatchTextSimilarityParams& params,
                                StreamHandle stream) {
  const DeviceGuard guard(out.device.index);
  const std::int64_t batch = out.shape[0];
  const std::int64_t num_classes = out.shape[1];
  const std::int64_t num_patches = out.shape[2];
  const std::int64_t depth = patch_embeds.shape[2];
  const std::int64_t text_stride = text_embeds.shape.rank == 3 ? num_classes * depth : 0;
  const dim3 grid(tiles(num_patches), tiles(num_classes),
                  static_cast<unsigned>(std::min(batch, kMaxGridZ)));
  ZSSEG_DISPATCH_FLOAT(
      patch_embeds.dtype, Patch,
      ZSSEG_DISPATCH_FLOAT(
          text_embeds.dtype, Text,
          launch("patch_text_similarity_kernel", patch_text_similarity_kernel<Patch, Text>,
                 {grid, kThreads}, to_stream(stream), patch_embeds.as<const Patch>(),
                 text_embeds.as<const Text>(), out.as<float>(), batch, num_classes, num_patches,
                 depth, text_stride, static_cast<float>(params.logit_scale), params.normalize)));
}

}  // namespace zsseg
