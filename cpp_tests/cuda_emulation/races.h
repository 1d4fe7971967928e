// Which threads of a block used which bytes of shared memory since they last waited for each other.
// Only code that was compiled with -fsanitize=thread tells; it is linked without that runtime.
#pragma once

#include <cstddef>
#include <string>

namespace cuda_emulation {

// Bytes to watch from now on; harmless where they are watched already.
void watch(const char* from, const char* to);

void order_block();                 // every thread has waited for every other
void order_warp(std::size_t warp);  // the lanes of a warp have waited for each other
std::string take_race();            // the first one since the last call; empty where there is none

int running_thread();  // its number in its block, -1 outside of kernels; block.cpp

}  // namespace cuda_emulation
