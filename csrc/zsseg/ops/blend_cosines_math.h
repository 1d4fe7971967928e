// The arithmetic of one class at one cell, for the CUDA kernel; the CPU kernel has it in vectors
// and shares the constants.
#pragma once

#include <cmath>

#include "zsseg/host_device.h"
#include "zsseg/ops/upsample_argmax_math.h"

namespace zsseg::blend {

enum class Activation { kSigmoid, kSoftmax };

// Logarithm of the largest probability that is told from 1: log-odds stay below 14.
constexpr float kLargestLog = -1e-6f;

// Absent classes, NaN and infinities stay what they are.
ZSSEG_HOST_DEVICE bool is_kept(float logit) {
  return !(fabsf(logit) < -upsample::kAbsentLogit);
}

ZSSEG_HOST_DEVICE float log_sigmoid(float logit) {
  return (logit < 0.0f ? logit : 0.0f) - log1pf(expf(-fabsf(logit)));
}

// Log-odds of the weighted geometric mean of two probabilities, given as logarithms.
ZSSEG_HOST_DEVICE float blended(float mask_log, float cosine_log, float weight) {
  const float mean = (1.0f - weight) * mask_log + weight * cosine_log;
  const float log = mean < kLargestLog ? mean : (mean >= kLargestLog ? kLargestLog : mean);
  return log - logf(-expm1f(log));
}

}  // namespace zsseg::blend
