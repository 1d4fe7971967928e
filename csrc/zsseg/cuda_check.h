// Every CUDA call is checked where it is made; cuda_launch.h checks launches. For sources that are
// built with CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "zsseg/error.h"

namespace zsseg {

// The remedy for an error of a capture; null for other errors.
inline const char* capture_advice(cudaError_t status) {
  switch (status) {
    case cudaErrorStreamCaptureUnsupported:
      return "Wait, allocate, free and copy pageable memory before or after the capture.";
    case cudaErrorStreamCaptureInvalidated:
      return "A call in this capture was refused before: correct that one.";
    case cudaErrorStreamCaptureUnjoined:
      return "Let the captured stream wait for every stream that waited for it.";
    case cudaErrorStreamCaptureMerge:
    case cudaErrorStreamCaptureIsolation:
    case cudaErrorCapturedEvent:
      return "Wait for other streams before the capture begins, or after it ends.";
    case cudaErrorStreamCaptureImplicit:
      return "Use a stream of your own, not the default stream.";
    case cudaErrorStreamCaptureUnmatched:
    case cudaErrorStreamCaptureWrongThread:
      return "End a capture on the stream and in the thread that began it.";
    default:
      return nullptr;
  }
}

// Whether an error ends all use of CUDA in this process: every later call repeats it. By number, as
// older headers do not name all of them.
inline bool stays(cudaError_t status) {
  const int number = static_cast<int>(status);
  return number == 214 ||                   // uncorrectable memory error
         number == 220 || number == 226 ||  // of NVLink
         number == 700 || number == 702 ||  // illegal address, timeout
         (number >= 709 && number <= 710) || (number >= 714 && number <= 719);
}

inline void cuda_check(cudaError_t status, const char* call, const char* file, int line) {
  if (status == cudaSuccess) {
    return;
  }
  static_cast<void>(cudaGetLastError());  // do not let the next check report it again
  const char* advice = capture_advice(status);
  const std::string text = std::string(call) + ": expected success, got " +
                           cudaGetErrorName(status) + " (" + cudaGetErrorString(status) + ") at " +
                           file + ":" + std::to_string(line) + ". " +
                           (advice != nullptr ? advice
                            : stays(status)   ? "The GPU's context is lost. Restart the process."
                                              : "Run 'zsseg-rt doctor'.");
  if (advice != nullptr) {
    throw CaptureError(text);
  }
  throw CudaError(text);
}

}  // namespace zsseg

// The file's own name where the compiler tells it: build paths do not belong into messages.
#if defined(__FILE_NAME__)
#define ZSSEG_FILE_NAME __FILE_NAME__
#else
#define ZSSEG_FILE_NAME __FILE__
#endif

#define ZSSEG_CUDA_CHECK(call) ::zsseg::cuda_check((call), #call, ZSSEG_FILE_NAME, __LINE__)
