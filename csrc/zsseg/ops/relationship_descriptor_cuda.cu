#include <algorithm>
#include <cstdint>

#include "zsseg/cuda_launch.h"
#include "zsseg/cuda_raii.h"
#include "zsseg/ops/dot_tile_cuda.h"
#include "zsseg/ops/relationship_descriptor.h"

namespace zsseg {
namespace {

constexpr std::int64_t kMaxGridZ = 65535;

// One block a tile of 64 classes by 64 outputs of one image. Bound by arithmetic for many classes,
// by reading the weight for few. Caller guarantees: contiguous float32, no empty result.
__global__ void __launch_bounds__(kThreads)
    relationship_descriptor_kernel(const float* __restrict__ cls,     // [batch, depth] or null
                                   const float* __restrict__ text,    // [classes, depth]
                                   const float* __restrict__ weight,  // [outputs, 2 * depth]
                                   const float* __restrict__ bias,    // [outputs]
                                   const float* __restrict__ text_queries,  // [classes, outputs]
                                                                            // or null
                                   float* __restrict__ out,  // [batch, classes, outputs]
                                   std::int64_t batch, std::int64_t num_classes,
                                   std::int64_t num_outputs, std::int64_t depth) {
  __shared__ DotTileStorage storage;
  const std::int64_t first_class = static_cast<std::int64_t>(blockIdx.y) * kTile;
  const std::int64_t first_output = static_cast<std::int64_t>(blockIdx.x) * kTile;
  const auto visit_nothing = [](const DotTileStorage&) {};
  for (std::int64_t image = blockIdx.z; image < batch; image += gridDim.z) {
    float sums[kPerThread][kPerThread] = {};
    const auto text_row = [&](int line, std::int64_t k) {
      const std::int64_t index = first_class + line;
      return index < num_classes ? text[index * depth + k] : 0.0f;
    };
    const auto weight_row = [&](int line, std::int64_t k) {
      const std::int64_t index = first_output + line;
      return index < num_outputs ? weight[index * 2 * depth + k] : 0.0f;
    };
    if (cls != nullptr) {
      const float* image_cls = cls + image * depth;
      const auto related_row = [&](int line, std::int64_t k) {
        return image_cls[k] * text_row(line, k);
      };
      add_dot_tile(storage, related_row, weight_row, depth, visit_nothing, sums);
    }
    if (text_queries == nullptr) {
      const auto text_weight_row = [&](int line, std::int64_t k) {
        return weight_row(line, depth + k);
      };
      add_dot_tile(storage, text_row, text_weight_row, depth, visit_nothing, sums);
    }
    for (int i = 0; i < kPerThread; ++i) {
      for (int j = 0; j < kPerThread; ++j) {
        const std::int64_t row = first_class + threadIdx.x / 16 + 16 * i;
        const std::int64_t column = first_output + threadIdx.x % 16 + 16 * j;
        if (row < num_classes && column < num_outputs) {
          const float rest =
              text_queries != nullptr ? text_queries[row * num_outputs + column] : bias[column];
          out[(image * num_classes + row) * num_outputs + column] = sums[i][j] + rest;
        }
      }
    }
  }
}

unsigned tiles(std::int64_t count) {
  return static_cast<unsigned>((count + kTile - 1) / kTile);
}

}  // namespace

void relationship_descriptor_cuda(const RelationshipDescriptorInputs& inputs, const TensorView& out,
                                  StreamHandle stream) {
  const DeviceGuard guard(out.device.index);
  const std::int64_t batch = inputs.cls_embed.data != nullptr ? inputs.cls_embed.shape[0] : 1;
  const std::int64_t num_classes = inputs.text_embeds.shape[0];
  const std::int64_t num_outputs = inputs.weight.shape[0];
  const dim3 grid(tiles(num_outputs), tiles(num_classes),
                  static_cast<unsigned>(std::min(batch, kMaxGridZ)));
  launch("relationship_descriptor_kernel", relationship_descriptor_kernel, {grid, kThreads},
         to_stream(stream), inputs.cls_embed.as<const float>(),
         inputs.text_embeds.as<const float>(), inputs.weight.as<const float>(),
         inputs.bias.as<const float>(), inputs.text_queries.as<const float>(), out.as<float>(),
         batch, num_classes, num_outputs, inputs.text_embeds.shape[1]);
}

}  // namespace zsseg
