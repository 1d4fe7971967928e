#include <cstdint>

#include "zsseg/cpu_scratch.h"
#include "zsseg/dtype_dispatch.h"
#include "zsseg/ops/dot_tile.h"
#include "zsseg/ops/packed_product.h"
#include "zsseg/ops/relationship_descriptor.h"
#include "zsseg/thread_pool.h"

namespace zsseg {
namespace ZSSEG_ISA_NAMESPACE {
namespace {

constexpr int kBlockOutputs =
    32;  // so many rows of 512 floats fill a second-level cache by a tenth
constexpr std::int64_t kGrainMultiplications = 1 << 20;  // about 50 us of work

template <typename Element>
struct Problem {
  const Element* cls;         // [depth], or null for the text half alone
  const Element* text;        // [num_classes, depth]
  const Element* weight;      // [num_outputs, 2 * depth]
  const float* bias;          // [num_outputs]
  const float* text_queries;  // [num_classes, num_outputs], or null
  float* out;                 // [num_classes, num_outputs], or null
  Element* narrow_out;        // the same of the other type, or null
  std::int64_t num_classes;
  std::int64_t num_outputs;
  std::int64_t depth;
};

inline void narrow(float value, float* to) {
  *to = value;
}
inline void narrow(float value, Half* to) {
  *to = float_to_half(value);
}
inline void narrow(float value, Bfloat16* to) {
  *to = float_to_bfloat16(value);
}

template <typename Element>
inline void write(const Problem<Element>& problem, std::int64_t at, float value) {
  if (problem.out != nullptr) {
    problem.out[at] = value;
  } else {
    narrow(value, problem.narrow_out + at);
  }
}

// kTileRows classes by kTileColumns outputs. Rows past the end repeat the last one and are dropped.
template <typename Element>
void descriptor_tile(const Problem<Element>& problem, std::int64_t first_class,
                     std::int64_t first_output) {
  const std::int64_t depth = problem.depth;
  PlainRow<Element> text[kTileRows];
  ProductRow<Element> related[kTileRows];
  PlainRow<Element> related_weight[kTileColumns];
  PlainRow<Element> text_weight[kTileColumns];
  for (int row = 0; row < kTileRows; ++row) {
    text[row].data = problem.text + smaller(first_class + row, problem.num_classes - 1) * depth;
    related[row] = {problem.cls, text[row].data};
  }
  for (int column = 0; column < kTileColumns; ++column) {
    related_weight[column].data =
        problem.weight + smaller(first_output + column, problem.num_outputs - 1) * 2 * depth;
    text_weight[column].data = related_weight[column].data + depth;
  }
  float sums[kTileRows][kTileColumns] = {};
  if (problem.cls != nullptr) {
    add_dot_tile(related, related_weight, depth, sums);
  }
  if (problem.text_queries == nullptr) {
    add_dot_tile(text, text_weight, depth, sums);
  }
  const std::int64_t num_rows = smaller(kTileRows, problem.num_classes - first_class);
  const std::int64_t num_columns = smaller(kTileColumns, problem.num_outputs - first_output);
  for (std::int64_t row = 0; row < num_rows; ++row) {
    const std::int64_t offset = (first_class + row) * problem.num_outputs + first_output;
    const float* rest = problem.text_queries != nullptr ? problem.text_queries + offset
                                                        : problem.bias + first_output;
    for (std::int64_t column = 0; column < num_columns; ++column) {
      write(problem, offset + column, sums[row][column] + rest[column]);
    }
  }
}

template <typename Element>
void descriptor_block(const Problem<Element>& problem, std::int64_t first_output) {
  const std::int64_t end_output = smaller(first_output + kBlockOutputs, problem.num_outputs);
  for (std::int64_t row = 0; row < problem.num_classes; row += kTileRows) {
    for (std::int64_t output = first_output; output < end_output; output += kTileColumns) {
      descriptor_tile(problem, row, output);
    }
  }
}

// Of a class's packed row: the image's half, the text's, or both one after the other.
template <typename Element>
std::int64_t packed_depth(const Problem<Element>& problem) {
  return problem.depth *
         ((problem.cls != nullptr ? 1 : 0) + (problem.text_queries == nullptr ? 1 : 0));
}

template <typename Element>
void pack_classes(const Problem<Element>& problem, float* packed) {
  const std::int64_t depth = problem.depth, whole = packed_depth(problem);
  const bool with_image = problem.cls != nullptr;
  if (with_image) {
    pack_lines(
        [&](std::int64_t index) {
          return ProductRow<Element>{problem.cls, problem.text + index * depth};
        },
        problem.num_classes, 0, depth, whole, packed);
  }
  if (problem.text_queries == nullptr) {
    pack_lines([&](std::int64_t index) { return PlainRow<Element>{problem.text + index * depth}; },
               problem.num_classes, with_image ? depth : 0, depth, whole, packed);
  }
}

template <typename Element>
void packed_block(const Problem<Element>& problem, const float* packed, std::int64_t first_output) {
  const std::int64_t end_output = smaller(first_output + kPackedRows, problem.num_outputs);
  const Element* weight = problem.weight + (problem.cls != nullptr ? 0 : problem.depth);
  const PackedProduct<Element> product{packed, weight, problem.num_classes, 2 * problem.depth,
                                       packed_depth(problem)};
  multiply_packed(product, first_output, end_output, [&](const PackedSums& sums) {
    for (std::int64_t c = 0; c < sums.num_lines; ++c) {
      const std::int64_t offset = (sums.first_line + c) * problem.num_outputs;
      const float* rest =
          problem.text_queries != nullptr ? problem.text_queries + offset : problem.bias;
      for (std::int64_t i = 0; i < sums.num_rows; ++i) {
        const std::int64_t output = sums.first_row + i;
        write(problem, offset + output, sums.values[i * sums.pitch + c] + rest[output]);
      }
    }
  });
}

template <typename Element>
void all_images(const RelationshipDescriptorInputs& inputs, const TensorView& out) {
  const bool is_narrow = out.dtype != DType::float32;
  const Problem<Element> first{inputs.cls_embed.as<const Element>(),
                               inputs.text_embeds.as<const Element>(),
                               inputs.weight.as<const Element>(),
                               inputs.bias.as<const float>(),
                               inputs.text_queries.as<const float>(),
                               is_narrow ? nullptr : out.as<float>(),
                               is_narrow ? out.as<Element>() : nullptr,
                               inputs.text_embeds.shape[0],
                               inputs.weight.shape[0],
                               inputs.text_embeds.shape[1]};
  const std::int64_t batch = first.cls != nullptr ? inputs.cls_embed.shape[0] : 1;
  const bool is_packed = first.num_classes >= kPackedFrom;
  const std::int64_t block_outputs = is_packed ? kPackedRows : kBlockOutputs;
  const std::int64_t num_blocks = (first.num_outputs + block_outputs - 1) / block_outputs;
  const std::int64_t grain =
      kGrainMultiplications / larger(1, block_outputs * first.num_classes * 2 * first.depth) + 1;
  float* packed = is_packed ? cpu_scratch(static_cast<std::size_t>(
                                  packed_count(first.num_classes, packed_depth(first))))
                            : nullptr;
  for (std::int64_t image = 0; image < batch; ++image) {
    Problem<Element> problem = first;
    problem.cls = first.cls != nullptr ? first.cls + image * first.depth : nullptr;
    const std::int64_t skipped = image * first.num_classes * first.num_outputs;
    problem.out = is_narrow ? nullptr : first.out + skipped;
    problem.narrow_out = is_narrow ? first.narrow_out + skipped : nullptr;
    if (is_packed) {
      pack_classes(problem, packed);
    }
    parallel_for(0, num_blocks, grain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t block = begin; block < end; ++block) {
        if (is_packed) {
          packed_block(problem, packed, block * block_outputs);
        } else {
          descriptor_block(problem, block * block_outputs);
        }
      }
    });
  }
}

}  // namespace

void relationship_descriptor_cpu(const RelationshipDescriptorInputs& inputs,
                                 const TensorView& out) {
  ZSSEG_DISPATCH_ANY_FLOAT(inputs.text_embeds.dtype, Element, all_images<Element>(inputs, out));
}

}  // namespace ZSSEG_ISA_NAMESPACE
}  // namespace zsseg
