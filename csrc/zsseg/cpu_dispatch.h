// One kernel source, several instruction sets: <op>_cpu.cpp is compiled once per set into its own
// namespace; the set is chosen once per process.
//
// In <op>_cpu.cpp, code lives in `namespace zsseg { namespace ZSSEG_ISA_NAMESPACE { ... } }` and
// may call nothing inline from outside it that is not ZSSEG_HOST_DEVICE: the linker keeps one copy
// of an inline function, and it might be the one that needs AVX-512.
#pragma once

#include <string>
#include <vector>

namespace zsseg {

enum class CpuIsa { baseline, v3, v4 };  // the x86-64 levels; elsewhere baseline only (NEON on Arm)

const char* name_of(CpuIsa isa);

// Those that this binary holds and this CPU runs, lowest first; never empty.
std::vector<CpuIsa> available_cpu_isas();

// The one in use: the environment variable ZSSEG_CPU_ISA, else the highest available.
// Throws ArgumentError if the variable names an unknown or unavailable one.
CpuIsa cpu_isa();

// Chooses by name; throws ArgumentError as above. For tests and benchmarks.
void set_cpu_isa(const std::string& name);

}  // namespace zsseg

#if defined(ZSSEG_HAVE_ISA_V3)
#define ZSSEG_FOR_ISA_V3(...) __VA_ARGS__
#else
#define ZSSEG_FOR_ISA_V3(...)
#endif
#if defined(ZSSEG_HAVE_ISA_V4)
#define ZSSEG_FOR_ISA_V4(...) __VA_ARGS__
#else
#define ZSSEG_FOR_ISA_V4(...)
#endif

// At namespace zsseg: declares a CPU kernel in every namespace, e.g.
//   ZSSEG_DECLARE_CPU_KERNEL(void overlay_cpu(const TensorView& frame, ...))
#define ZSSEG_DECLARE_CPU_KERNEL(...)                 \
  namespace isa_baseline {                            \
  __VA_ARGS__;                                        \
  }                                                   \
  ZSSEG_FOR_ISA_V3(namespace isa_v3 { __VA_ARGS__; }) \
  ZSSEG_FOR_ISA_V4(namespace isa_v4 { __VA_ARGS__; })

// Calls the kernel of the instruction set in use: ZSSEG_CALL_CPU_KERNEL(overlay_cpu, frame, ...).
#define ZSSEG_CALL_CPU_KERNEL(kernel, ...)                                                      \
  do {                                                                                          \
    switch (::zsseg::cpu_isa()) {                                                               \
      ZSSEG_FOR_ISA_V4(case ::zsseg::CpuIsa::v4 : ::zsseg::isa_v4::kernel(__VA_ARGS__); break;) \
      ZSSEG_FOR_ISA_V3(case ::zsseg::CpuIsa::v3 : ::zsseg::isa_v3::kernel(__VA_ARGS__); break;) \
      default:                                                                                  \
        ::zsseg::isa_baseline::kernel(__VA_ARGS__);                                             \
    }                                                                                           \
  } while (false)
