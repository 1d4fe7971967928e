// Two arrays of rows added, and the sum's rows normalised, once or twice: what lies between the
// products of a transformer, in one launch.
#pragma once

#include "zsseg/cpu_dispatch.h"
#include "zsseg/tensor_view.h"

namespace zsseg {

constexpr int kMaxNorms = 2;
constexpr std::int64_t kMaxNormWidth = 2048;  // what a block keeps in registers

struct AddLayerNormArgs {
  const TensorView& x;           // as y, or of wider rows: the first D of each are read
  const TensorView& y;           // float32, float16 or bfloat16 [N, D]
  const TensorView& scale;       // float32 [L, D]
  const TensorView& shift;       // float32 [L, D]
  float eps[kMaxNorms];          // [L]
  std::int64_t total_after = 0;  // norms before `total`, fewer than L
};

struct AddLayerNormOutputs {
  const TensorView& out;  // as y
  TensorView total;       // as y, or none
};

// v = x + y, rounded; then for l = 0 .. L - 1 each row v becomes
// (v - mean(v)) / sqrt(mean((v - mean(v))^2) + eps[l]) * scale[l] + shift[l], in float32. out = v,
// rounded. total, if given, is v after `total_after` norms, rounded; the rest begins from there.
// Checks the inputs and returns the results' shape. L is 1 or 2, D from 1 to 2048.
Shape add_layer_norm_shape(const AddLayerNormArgs& args);

// As above; what is written shares no memory with anything else.
void add_layer_norm(const AddLayerNormArgs& args, const AddLayerNormOutputs& outputs,
                    StreamHandle stream);

// Arguments are checked and not empty.
ZSSEG_DECLARE_CPU_KERNEL(void add_layer_norm_cpu(const AddLayerNormArgs& args,
                                                 const AddLayerNormOutputs& outputs))
void add_layer_norm_cuda(const AddLayerNormArgs& args, const AddLayerNormOutputs& outputs,
                         StreamHandle stream);

}  // namespace zsseg
