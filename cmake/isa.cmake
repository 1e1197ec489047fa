# CPU kernel files carry their instruction set in their name: anything_<isa>.cpp. Each is compiled with the flags
# of its row and chosen at run time, so one library runs on every CPU of its architecture.
#
# They include <immintrin.h>, <cstdint> and headers of their own, no shared template: the linker keeps one copy of an
# inline function, and the copy with the widest vectors would crash the others' machines (tests/test_build.py looks).
#
# A new instruction set is one row here; a new kernel file for a known one changes no CMake.

set(LOWBIT_ISA_portable_arch any)
set(LOWBIT_ISA_portable_flags "")

set(LOWBIT_ISA_avx2_arch x86_64)
set(LOWBIT_ISA_avx2_flags -mavx2 -mfma -mf16c)

set(LOWBIT_ISA_avx512_arch x86_64)
set(LOWBIT_ISA_avx512_flags ${LOWBIT_ISA_avx2_flags} -mavx512f -mavx512bw -mavx512dq -mavx512vl)

# gcc 12 warns about its own intrinsics (_mm512_undefined and what is built on it).
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  list(APPEND LOWBIT_ISA_avx512_flags -Wno-uninitialized -Wno-maybe-uninitialized)
endif()

set(LOWBIT_ISA_avx512vnni_arch x86_64)
set(LOWBIT_ISA_avx512vnni_flags ${LOWBIT_ISA_avx512_flags} -mavx512vnni -mavx512vbmi)

set(LOWBIT_ISA_avx512bf16_arch x86_64)
set(LOWBIT_ISA_avx512bf16_flags ${LOWBIT_ISA_avx512vnni_flags} -mavx512bf16)

set(LOWBIT_ISA_amx_arch x86_64)
set(LOWBIT_ISA_amx_flags ${LOWBIT_ISA_avx512bf16_flags} -mamx-tile -mamx-int8 -mamx-bf16)

set(LOWBIT_ISA_neon_arch arm64)
set(LOWBIT_ISA_neon_flags "")
# Scheduling before registers are assigned makes gcc spill half of what it computes: twice the instructions.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  set(LOWBIT_ISA_neon_flags -fno-schedule-insns)
endif()

set(LOWBIT_ISA_neondotprod_arch arm64)
set(LOWBIT_ISA_neondotprod_flags ${LOWBIT_ISA_neon_flags} -march=armv8.2-a+dotprod)

set(LOWBIT_ISA_neoni8mm_arch arm64)
set(LOWBIT_ISA_neoni8mm_flags ${LOWBIT_ISA_neon_flags} -march=armv8.2-a+dotprod+i8mm)

# The architecture compiled for, as the rows above spell it.
function(lowbit_target_arch out)
  string(TOLOWER "${CMAKE_SYSTEM_PROCESSOR}" arch)
  if(APPLE AND CMAKE_OSX_ARCHITECTURES)
    set(arch "${CMAKE_OSX_ARCHITECTURES}")
    list(LENGTH arch count)
    if(count GREATER 1)
      lowbit_stop("CMAKE_OSX_ARCHITECTURES=${arch}: build one architecture at a time, kernel files have per-architecture flags")
    endif()
  endif()
  if(arch MATCHES "^(x86_64|amd64)$")
    set(arch x86_64)
  elseif(arch MATCHES "^(aarch64|arm64)$")
    set(arch arm64)
  endif()
  set(${out} "${arch}" PARENT_SCOPE)
endfunction()

# lowbit_kernel_sources(OUT file...): keeps the files this architecture can run and sets their flags.
function(lowbit_kernel_sources out)
  lowbit_target_arch(arch)
  set(kept "")
  foreach(file IN LISTS ARGN)
    get_filename_component(name "${file}" NAME_WE)
    string(REGEX REPLACE "^.*_" "" isa "${name}")
    if(NOT DEFINED LOWBIT_ISA_${isa}_arch)
      lowbit_stop("${file}: cmake/isa.cmake has no row for the instruction set '${isa}' that its name ends in")
    endif()
    if(LOWBIT_ISA_${isa}_arch STREQUAL "any" OR LOWBIT_ISA_${isa}_arch STREQUAL arch)
      set_source_files_properties("${file}" PROPERTIES COMPILE_OPTIONS "${LOWBIT_ISA_${isa}_flags}")
      list(APPEND kept "${file}")
    endif()
  endforeach()
  set(${out} "${kept}" PARENT_SCOPE)
endfunction()
