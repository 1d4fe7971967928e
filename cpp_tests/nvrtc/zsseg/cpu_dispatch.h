// For NVRTC: nothing runs on the CPU.
#pragma once

#define ZSSEG_DECLARE_CPU_KERNEL(...)
