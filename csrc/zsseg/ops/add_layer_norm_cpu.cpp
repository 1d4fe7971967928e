#include <cmath>
#include <cstdint>

#include "zsseg/cpu_scratch.h"
#include "zsseg/dtype_dispatch.h"
#include "zsseg/ops/add_layer_norm.h"
#include "zsseg/thread_pool.h"

namespace zsseg {
namespace ZSSEG_ISA_NAMESPACE {
namespace {

constexpr std::int64_t kGrainValues = 1 << 14;

inline float widen(float value) {
  return value;
}
inline float widen(Half value) {
  return half_to_float(value);
}
inline float widen(Bfloat16 value) {
  return bfloat16_to_float(value);
}
inline void narrow(float value, float& to) {
  to = value;
}
inline void narrow(float value, Half& to) {
  to = float_to_half(value);
}
inline void narrow(float value, Bfloat16& to) {
  to = float_to_bfloat16(value);
}

void normalise(float* row, std::int64_t width, const float* scale, const float* shift, float eps) {
  double total = 0.0, squares = 0.0;
  for (std::int64_t i = 0; i < width; ++i) {
    total += row[i];
  }
  const auto mean = static_cast<float>(total / static_cast<double>(width));
  for (std::int64_t i = 0; i < width; ++i) {
    squares += static_cast<double>(row[i] - mean) * (row[i] - mean);
  }
  const double variance = squares / static_cast<double>(width);
  const auto factor = static_cast<float>(1.0 / std::sqrt(variance + eps));
  for (std::int64_t i = 0; i < width; ++i) {
    row[i] = (row[i] - mean) * factor * scale[i] + shift[i];
  }
}

// Rounds a row to T, and stores it unless `to` is null.
template <typename T>
void round_row(float* row, std::int64_t width, T* to) {
  for (std::int64_t i = 0; i < width; ++i) {
    T rounded;
    narrow(row[i], rounded);
    row[i] = widen(rounded);
    if (to != nullptr) {
      to[i] = rounded;
    }
  }
}

template <typename T>
void run_row(const AddLayerNormArgs& args, const AddLayerNormOutputs& outputs, std::int64_t row,
             float* values) {
  const std::int64_t width = args.y.shape[1];
  const T* x = args.x.as<const T>() + row * args.x.shape[1];
  const T* y = args.y.as<const T>() + row * width;
  T* total = outputs.total.data == nullptr ? nullptr : outputs.total.as<T>() + row * width;
  for (std::int64_t i = 0; i < width; ++i) {
    values[i] = widen(x[i]) + widen(y[i]);
  }
  round_row<T>(values, width, args.total_after == 0 ? total : nullptr);
  for (std::int64_t norm = 0; norm < args.scale.shape[0]; ++norm) {
    if (norm > 0 && norm == args.total_after && total != nullptr) {
      round_row<T>(values, width, total);
    }
    normalise(values, width, args.scale.as<const float>() + norm * width,
              args.shift.as<const float>() + norm * width, args.eps[norm]);
  }
  round_row<T>(values, width, outputs.out.as<T>() + row * width);
}

}  // namespace

void add_layer_norm_cpu(const AddLayerNormArgs& args, const AddLayerNormOutputs& outputs) {
  const std::int64_t width = args.y.shape[1];
  parallel_for(
      0, args.x.shape[0], kGrainValues / width + 1, [&](std::int64_t begin, std::int64_t end) {
        float* values = cpu_scratch(static_cast<std::size_t>(width));
        for (std::int64_t row = begin; row < end; ++row) {
          ZSSEG_DISPATCH_ANY_FLOAT(args.x.dtype, T, run_row<T>(args, outputs, row, values));
        }
      });
}

}  // namespace ZSSEG_ISA_NAMESPACE
}  // namespace zsseg
