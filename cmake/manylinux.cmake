# Libraries for old systems, built on a new one: objects are compiled as always, and linked against the
# symbols of glibc 2.28, which zig brings (`pip install ziglang`). What newer headers want beside
# these is in manylinux.cpp.
find_package(Python COMPONENTS Interpreter REQUIRED)
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
          "import pathlib, ziglang; print(pathlib.Path(ziglang.__file__).with_name('zig'))"
  OUTPUT_VARIABLE MOEKV_ZIG OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE no_zig ERROR_QUIET)
if(no_zig)
  message(FATAL_ERROR "MOEKV_MANYLINUX=ON needs zig: pip install ziglang")
endif()
if(NOT CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  message(FATAL_ERROR "MOEKV_MANYLINUX=ON: expected g++, got ${CMAKE_CXX_COMPILER_ID}")
endif()
# zig would take libc++ for C++: exceptions of one library could not be caught in another. And its own
# compiler-rt for libgcc.a, whose __cpu_model says of every processor that it has no extensions. And it
# would drop what nothing refers to, such as the list of architectures that `moekv info` reads.
foreach(name libstdc++.so.6 libgcc_s.so.1 libgcc.a)
  execute_process(COMMAND ${CMAKE_CXX_COMPILER} -print-file-name=${name}
                  OUTPUT_VARIABLE path OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  list(APPEND MOEKV_CXX_RUNTIME ${path})
endforeach()
list(JOIN MOEKV_CXX_RUNTIME " " cxx_runtime)
set(CMAKE_CXX_CREATE_SHARED_LIBRARY
    "${MOEKV_ZIG} cc -target ${CMAKE_SYSTEM_PROCESSOR}-linux-gnu.2.28 -s -Wl,--no-gc-sections \
<LANGUAGE_COMPILE_FLAGS> <LINK_FLAGS> -shared <SONAME_FLAG><TARGET_SONAME> -o <TARGET> <OBJECTS> <LINK_LIBRARIES> ${cxx_runtime} -lm")
add_library(moekv_old_symbols OBJECT cmake/manylinux.cpp)
