# The CUDA library. nvcc is run directly: CMake's own support for CUDA links and runs a test program
# first, which the packages on PyPI do not allow.

# Where PyPI's packages put a toolkit, beside the torch that we build against.
get_filename_component(site_packages ${MOEKV_TORCH_DIR}/.. ABSOLUTE)
file(GLOB MOEKV_CUDA_PACKAGES LIST_DIRECTORIES TRUE ${site_packages}/nvidia/cu[0-9]*)

find_program(MOEKV_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin PATHS /usr/local/cuda/bin)
find_program(MOEKV_NVCC nvcc PATHS ${MOEKV_CUDA_PACKAGES} PATH_SUFFIXES bin)
if(NOT MOEKV_NVCC)
  if(MOEKV_CUDA STREQUAL "ON")
    message(FATAL_ERROR "MOEKV_CUDA=ON needs nvcc: install the CUDA toolkit, or\n"
                        "  pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-cuda-runtime "
                        "nvidia-cuda-cccl nvidia-nvvm")
  endif()
  message(STATUS "moekv: no nvcc found, building for the CPU alone")
  return()
endif()

# What nvcc itself takes for its toolkit; a launcher script may stand in front of it.
execute_process(COMMAND ${MOEKV_NVCC} --dryrun -x cu -c - OUTPUT_QUIET ERROR_VARIABLE nvcc_dryrun)
string(REGEX MATCH "TOP=([^\n]*)" nvcc_top "${nvcc_dryrun}")
get_filename_component(nvcc_root "${CMAKE_MATCH_1}" ABSOLUTE)
set(cuda_roots ${nvcc_root} ${MOEKV_CUDA_PACKAGES})

find_path(MOEKV_CUDA_INCLUDE_DIR cuda_runtime.h PATHS ${cuda_roots}
          PATH_SUFFIXES include NO_DEFAULT_PATH)
# Linked statically where it can be: then the library has no say in which CUDA runtime torch brings.
find_library(MOEKV_CUDART NAMES libcudart_static.a cudart PATHS ${cuda_roots}
             PATH_SUFFIXES lib64 lib NO_DEFAULT_PATH)
find_library(MOEKV_CUDART NAMES libcudart.so.13 libcudart.so.12 PATHS ${cuda_roots}
             PATH_SUFFIXES lib64 lib NO_DEFAULT_PATH)
if(NOT MOEKV_CUDA_INCLUDE_DIR OR NOT MOEKV_CUDART)
  if(MOEKV_CUDA STREQUAL "ON")
    message(FATAL_ERROR "MOEKV_CUDA=ON: ${MOEKV_NVCC} has no cuda_runtime.h or cudart beside it:\n"
                        "  pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl")
  endif()
  message(STATUS "moekv: nvcc without cuda_runtime.h and cudart, building for the CPU alone")
  return()
endif()

set(nvcc_flags
    -std=c++20 -O3 -DNDEBUG -DMOEKV_BACKEND=cuda
    -Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-fno-strict-aliasing
    -isystem ${MOEKV_CUDA_INCLUDE_DIR})
if(MOEKV_WERROR)
  list(APPEND nvcc_flags --Werror=all-warnings -Xcompiler=-Werror)
endif()
list(GET MOEKV_CUDA_ARCHITECTURES 0 first_architecture)
list(GET MOEKV_CUDA_ARCHITECTURES -1 last_architecture)
foreach(architecture ${MOEKV_CUDA_ARCHITECTURES})
  set(code sm_${architecture})
  # PTX of the last for GPUs that come after it, of the first for those between.
  if(architecture STREQUAL first_architecture OR architecture STREQUAL last_architecture)
    set(code [compute_${architecture},${code}])
  endif()
  list(APPEND nvcc_flags --generate-code=arch=compute_${architecture},code=${code})
endforeach()

set(cuda_objects)
foreach(name expected_attention expert_scores gating_topk key_diversity kv_compact lag mix_scores ragged_attention
             ragged_coded quantize_pairs select_kept project_tokens window_attention)
  set(source ${CMAKE_SOURCE_DIR}/csrc/cuda/${name}.cu)
  set(object ${CMAKE_BINARY_DIR}/cuda/${name}.o)
  add_custom_command(
    OUTPUT ${object}
    COMMAND ${MOEKV_NVCC} ${nvcc_flags} -MD -MF ${object}.d -c ${source} -o ${object}
    DEPENDS ${source} DEPFILE ${object}.d
    COMMENT "Building CUDA object ${name}.o" VERBATIM)
  list(APPEND cuda_objects ${object})
endforeach()
file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/cuda)

# The one function that we need of torch's CUDA half. A stand-in to link against: then a torch for the
# CPU is enough to build with. The real one is found when the library is loaded.
file(CONFIGURE OUTPUT ${CMAKE_BINARY_DIR}/cuda/torch_cuda.cpp CONTENT
     "extern \"C\" __attribute__((visibility(\"default\"))) int \
aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n")
add_library(moekv_torch_cuda SHARED ${CMAKE_BINARY_DIR}/cuda/torch_cuda.cpp)
set_target_properties(moekv_torch_cuda PROPERTIES OUTPUT_NAME torch_cuda
                      LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/cuda)

list(JOIN MOEKV_CUDA_ARCHITECTURES " " architectures)
add_library(moekv_cuda SHARED csrc/ops/stream.cpp csrc/cuda/architectures.cpp csrc/cuda/checks.cpp
            ${MOEKV_OPS} ${cuda_objects})
target_compile_definitions(
  moekv_cuda PRIVATE MOEKV_BACKEND=cuda MOEKV_CUDA USE_CUDA
                     "MOEKV_CUDA_ARCHITECTURES=\"${architectures} +PTX\"")
target_compile_options(moekv_cuda PRIVATE ${MOEKV_WARNINGS})
target_link_libraries(moekv_cuda PRIVATE moekv_torch moekv_torch_cuda ${MOEKV_CUDART}
                      ${CMAKE_DL_LIBS} pthread rt)
target_link_options(moekv_cuda PRIVATE LINKER:--no-undefined
                    LINKER:--version-script=${CMAKE_SOURCE_DIR}/csrc/exports.map)
set_property(TARGET moekv_cuda APPEND PROPERTY LINK_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/exports.map)
set_target_properties(moekv_cuda PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${MOEKV_OUTPUT_DIR}
                      SKIP_BUILD_RPATH ON)
