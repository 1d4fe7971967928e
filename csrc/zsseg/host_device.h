// Lets per-element arithmetic be written once for the CPU and the CUDA kernels.
#pragma once

// always_inline: an out-of-line copy of such a function, compiled for AVX-512, could otherwise be
// the one the linker keeps for the baseline kernels too.
#if defined(__CUDACC__)
#define ZSSEG_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ZSSEG_HOST_DEVICE inline __attribute__((always_inline))
#endif
