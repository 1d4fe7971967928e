# Which GPUs the CUDA part is built for. Without a project of its own: `cmake -P` can run it, too.

# Every GPU architecture that the kernels are built for in a wheel.
set(ZSSEG_ALL_CUDA_ARCHITECTURES 75 80 86 87 89 90 100 110 120)
# One a generation: its machine code runs on every later desktop or server GPU of the same
# generation. Jetsons run none of it: for them the driver compiles the PTX.
set(ZSSEG_GENERATIONS_OF_CUDA 75 80 90 100 120)
# What the kernels need; older GPUs are not supported.
set(ZSSEG_OLDEST_CUDA_ARCHITECTURE 75)

# Sets `out` to the architectures of this machine's GPUs, such as 86;89; empty where none is found.
function(zsseg_found_cuda_architectures out)
  if(NOT DEFINED ZSSEG_DEVICE_TREE)
    set(ZSSEG_DEVICE_TREE /proc/device-tree/compatible)
  endif()
  set(native)
  if(EXISTS "${ZSSEG_DEVICE_TREE}")  # a Jetson's nvidia-smi does not tell
    file(STRINGS "${ZSSEG_DEVICE_TREE}" board REGEX "nvidia,tegra")
    if(board MATCHES "nvidia,tegra234")
      list(APPEND native 87)
    elseif(board MATCHES "nvidia,tegra264")
      list(APPEND native 110)
    endif()
  endif()
  find_program(ZSSEG_NVIDIA_SMI nvidia-smi NO_CACHE)
  if(ZSSEG_NVIDIA_SMI)
    execute_process(COMMAND ${ZSSEG_NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader
                    OUTPUT_VARIABLE capabilities RESULT_VARIABLE failed ERROR_QUIET TIMEOUT 60)
    if(failed)
      message(STATUS "zsseg: ${ZSSEG_NVIDIA_SMI} names no GPU")
      set(capabilities "")
    endif()
    string(REGEX MATCHALL "[0-9]+\\.[0-9]+" capabilities "${capabilities}")
    string(REPLACE "." "" capabilities "${capabilities}")
    list(APPEND native ${capabilities})
  endif()
  list(REMOVE_DUPLICATES native)
  list(SORT native COMPARE NATURAL)
  set(${out} "${native}" PARENT_SCOPE)
endfunction()

# Sets `out` to whether this machine has an NVIDIA GPU, though nothing may tell which.
function(zsseg_has_gpu out)
  if(NOT DEFINED ZSSEG_DEVICES)
    set(ZSSEG_DEVICES /dev)
  endif()
  zsseg_found_cuda_architectures(native)
  file(GLOB nodes "${ZSSEG_DEVICES}/nvidia[0-9]*" "${ZSSEG_DEVICES}/nvgpu")
  set(${out} OFF PARENT_SCOPE)
  if(native OR nodes)
    set(${out} ON PARENT_SCOPE)
  endif()
endfunction()

# Sets `out` to those of `wanted` that the compiler, which knows `supported` (sm_75;...), can build.
function(zsseg_buildable_architectures out wanted supported)
  set(architectures)
  foreach(arch IN LISTS wanted)
    if(arch MATCHES "^[0-9]+$" AND arch LESS ZSSEG_OLDEST_CUDA_ARCHITECTURE)
      message(STATUS "zsseg: sm_${arch} is older than sm_${ZSSEG_OLDEST_CUDA_ARCHITECTURE}; dropped")
    elseif("sm_${arch}" IN_LIST supported)
      list(APPEND architectures ${arch})
    else()
      message(STATUS "zsseg: this CUDA compiler does not know sm_${arch}; dropped")
    endif()
  endforeach()
  set(${out} "${architectures}" PARENT_SCOPE)
endfunction()

# Sets `out` to the architectures to build: those that ZSSEG_CUDA_ARCHITECTURES names, ALL, or with
# AUTO those of this machine's GPUs and, where there are none, one a generation.
function(zsseg_chosen_architectures out supported)
  if(ZSSEG_CUDA_ARCHITECTURES STREQUAL "AUTO")
    zsseg_found_cuda_architectures(native)
    zsseg_buildable_architectures(architectures "${native}" "${supported}")
    if(NOT architectures)
      zsseg_buildable_architectures(architectures "${ZSSEG_GENERATIONS_OF_CUDA}" "${supported}")
      message(STATUS "zsseg: no GPU to build for was found here, building for one of each "
        "generation; ZSSEG_CUDA_ARCHITECTURES names others, such as 87 or ALL")
    endif()
  elseif(ZSSEG_CUDA_ARCHITECTURES STREQUAL "ALL")
    zsseg_buildable_architectures(architectures "${ZSSEG_ALL_CUDA_ARCHITECTURES}" "${supported}")
  else()
    zsseg_buildable_architectures(architectures "${ZSSEG_CUDA_ARCHITECTURES}" "${supported}")
  endif()
  if(NOT architectures)
    message(FATAL_ERROR "ZSSEG_CUDA_ARCHITECTURES: expected AUTO, ALL or at least one of "
      "${supported}, such as 86;89, got ${ZSSEG_CUDA_ARCHITECTURES}")
  endif()
  list(SORT architectures COMPARE NATURAL)
  set(${out} "${architectures}" PARENT_SCOPE)
endfunction()

# Sets `out` to the --generate-code flags: machine code for every chosen architecture, PTX of the
# newest for GPUs to come and PTX of the oldest for all between (compute_120 PTX does not serve 10.3
# or 11.x).
function(zsseg_cuda_code_flags out)
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-code OUTPUT_VARIABLE supported
                  RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "${CMAKE_CUDA_COMPILER} --list-gpu-code failed")
  endif()
  string(REGEX MATCHALL "sm_[0-9]+" supported "${supported}")
  zsseg_chosen_architectures(architectures "${supported}")
  list(GET architectures 0 oldest)
  list(GET architectures -1 newest)
  if("sm_${ZSSEG_OLDEST_CUDA_ARCHITECTURE}" IN_LIST supported)
    set(oldest ${ZSSEG_OLDEST_CUDA_ARCHITECTURE})
  endif()
  set(flags)
  foreach(arch IN LISTS architectures)
    list(APPEND flags "--generate-code=arch=compute_${arch},code=sm_${arch}")
  endforeach()
  foreach(arch IN ITEMS ${oldest} ${newest})
    list(APPEND flags "--generate-code=arch=compute_${arch},code=compute_${arch}")
  endforeach()
  list(REMOVE_DUPLICATES flags)
  message(STATUS "zsseg: CUDA machine code for ${architectures}, PTX for ${oldest} and ${newest}")
  set(${out} "${flags}" PARENT_SCOPE)
endfunction()
