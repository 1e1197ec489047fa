# Finds out whether liblowbit_cuda can be built here, and compiles its .cu files.
#
#   lowbit_find_cuda()   ->  LOWBIT_CUDA_ABSENT_REASON ("" where it can be built), LOWBIT_NVCC, LOWBIT_CUDA_VERSION,
#                            LOWBIT_CUDA_ARCHS_USED, LOWBIT_CUDART
#   lowbit_cuda_objects(OUT ARCHS list SOURCES file...)  ->  one object file per source
#
# Plain custom commands instead of CMake's CUDA language: enabling that language stops the whole configuration where
# nvcc and the C++ compiler do not get along, and an install must go on without CUDA then, with the reason at hand.

set(LOWBIT_CUDA AUTO CACHE STRING "The CUDA library: AUTO builds it where nvcc works, ON stops where it does not, OFF")
set_property(CACHE LOWBIT_CUDA PROPERTY STRINGS AUTO ON OFF)

# A list with one item per device code in the library: 90 is machine code for sm_90, 90-ptx is what drivers compile at load
# time for devices without any of their own. `native` stands for the devices in this machine, `all` for
#   80  A100       86  RTX 30, A40       89  RTX 40, L40S       90a  H100, H200, with wgmma       120f  RTX 50, GB10
#   80-ptx, 90-ptx  everything else from 8.0 and, with fp8 matrix instructions, from 9.0 on: B200, Thor, what comes next
set(LOWBIT_CUDA_ARCHS all CACHE STRING "Device code in the CUDA library: all, native, or a list such as 80,90a,90-ptx")
set(LOWBIT_CUDA_ALL_ARCHS 80 86 89 90a 120f 80-ptx 90-ptx)

# The first nvcc that knows sm_120.
set(LOWBIT_CUDA_MINIMUM 12.8)

# Files in which device code depends on the architecture (__CUDA_ARCH__): one pass of nvcc's front end for each.
set(LOWBIT_CUDA_ARCH_DEPENDENT "^a8_fp8")

# Files for 90a alone, which a build without it leaves out. LOWBIT_HOPPER says that they are there. Not compressed, so that
# tests read the machine code of these kernels without NVIDIA's tools (tests/cuda_audit.py).
set(LOWBIT_CUDA_HOPPER "^hopper_")

# Files whose results must be the CPU's bit for bit: no a * b + c in one rounding.
set(LOWBIT_CUDA_EXACT "^(de)?quantize")

# ---- what is there -----------------------------------------------------------------------------------------------------

# The variables are those that CMake's own CUDA support and most build systems listen to.
function(_lowbit_find_nvcc out)
  set(nvcc "${CMAKE_CUDA_COMPILER}")
  if(NOT nvcc)
    set(nvcc "$ENV{CUDACXX}")
  endif()
  if(NOT nvcc)
    find_program(nvcc_found nvcc
      HINTS ENV CUDA_HOME ENV CUDA_PATH
      PATHS /usr/local/cuda /opt/cuda
      PATH_SUFFIXES bin
      NO_CACHE)
    if(nvcc_found)
      set(nvcc "${nvcc_found}")
    endif()
  endif()
  set(${out} "${nvcc}" PARENT_SCOPE)
endfunction()

# The C++ compiler that nvcc calls: the one that compiles everything else, unless told otherwise.
function(_lowbit_host_compiler out)
  set(host "${CMAKE_CUDA_HOST_COMPILER}")
  if(NOT host)
    set(host "$ENV{CUDAHOSTCXX}")
  endif()
  if(NOT host)
    set(host "${CMAKE_CXX_COMPILER}")
  endif()
  set(${out} "${host}" PARENT_SCOPE)
endfunction()

# This machine's devices as items of LOWBIT_CUDA_ARCHS. 9.0 and 12.x take the variant that has everything.
function(_lowbit_native_archs out)
  execute_process(
    COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE answer
    OUTPUT_STRIP_TRAILING_WHITESPACE
    ERROR_QUIET)
  string(REGEX MATCHALL "[0-9]+\\.[0-9]" capabilities "${answer}")
  set(archs "")
  foreach(capability IN LISTS capabilities)
    string(REPLACE "." "" arch "${capability}")
    if(arch EQUAL 90)
      set(arch 90a)
    elseif(arch GREATER_EQUAL 120 AND arch LESS 130)
      set(arch 120f)
    endif()
    list(APPEND archs "${arch}")
  endforeach()
  list(REMOVE_DUPLICATES archs)
  set(${out} "${archs}" PARENT_SCOPE)
endfunction()

# -gencode flags for a list like LOWBIT_CUDA_ARCHS: one pass of nvcc's front end for each, except that machine code for 8.6
# and 8.7 is assembled from the pass for 8.0, since no instruction tells them apart.
function(_lowbit_gencode out)
  set(passes "")
  foreach(arch IN LISTS ARGN)
    if(NOT arch MATCHES "^([0-9]+)([af]?)(-ptx)?$")
      lowbit_stop("LOWBIT_CUDA_ARCHS: '${arch}' is neither all, native, nor like 90, 90a, 120f, 90-ptx")
    endif()
    set(pass "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
    set(code "sm_${pass}")
    if(CMAKE_MATCH_3)
      set(code "compute_${pass}")
    elseif(pass MATCHES "^8[67]$" AND "80" IN_LIST ARGN)
      set(pass 80)
    endif()
    list(APPEND passes ${pass})
    list(APPEND codes_${pass} ${code})
  endforeach()
  list(REMOVE_DUPLICATES passes)
  set(flags "")
  foreach(pass IN LISTS passes)
    list(JOIN codes_${pass} "," codes)
    list(APPEND flags "-gencode=arch=compute_${pass},code=[${codes}]")
  endforeach()
  set(${out} "${flags}" PARENT_SCOPE)
endfunction()

# The same list for files in which nothing depends on the architecture: one pass, for the oldest, and machine code for all from
# that; the front end costs more than all assemblers together. Without the features of 90a and 120f there is nothing in
# them that sm_90 and sm_120 have not, and with nothing to choose, PTX for the oldest is as good as PTX for later ones.
function(_lowbit_gencode_one_pass out)
  set(oldest 999)
  set(codes "")
  set(ptx "")
  foreach(arch IN LISTS ARGN)
    string(REGEX MATCH "^[0-9]+" number "${arch}")
    if(number LESS oldest)
      set(oldest ${number})
    endif()
    if(arch MATCHES "-ptx$")
      list(APPEND ptx ${number})
    else()
      list(APPEND codes "sm_${number}")
    endif()
  endforeach()
  if(ptx)
    list(APPEND codes "compute_${oldest}")
  endif()
  list(JOIN codes "," codes)
  set(${out} "-gencode=arch=compute_${oldest},code=[${codes}]" PARENT_SCOPE)
endfunction()

# Compiles and links a few lines as the library will be. "" or why that failed, in one line.
function(_lowbit_probe_nvcc out options)
  set(folder "${CMAKE_CURRENT_BINARY_DIR}/lowbit_cuda_probe")
  set(source "${folder}/probe.cu")
  file(WRITE "${source}" "#include <cuda_runtime_api.h>\n#include <algorithm>\n#include <string>\n"
    "__global__ void probe(int* x) { *x = 1; }\n"
    "int start(int* x) { probe<<<1, 1>>>(x); return std::max<int>(0, cudaGetLastError()); }\n")
  execute_process(
    COMMAND "${LOWBIT_NVCC}" --options-file "${options}" -c "${source}" -o "${folder}/probe.o"
    RESULT_VARIABLE status
    OUTPUT_VARIABLE said
    ERROR_VARIABLE said)
  if(status EQUAL 0)
    execute_process(
      COMMAND "${CMAKE_CXX_COMPILER}" -shared "${folder}/probe.o" "${LOWBIT_CUDART}" -o "${folder}/probe.so"
              -ldl -lrt -lpthread
      RESULT_VARIABLE status
      OUTPUT_VARIABLE said
      ERROR_VARIABLE said)
  endif()
  file(WRITE "${folder}/probe.log" "${said}")
  if(status EQUAL 0)
    set(${out} "" PARENT_SCOPE)
    return()
  endif()
  # The line that says what is wrong, without the folders of this machine and what a definition cannot hold: it becomes a
  # string in the library.
  if(said MATCHES "[^\n]*(error|fatal|unsupported|undefined|cannot)[^\n]*")
    set(said "${CMAKE_MATCH_0}")
  endif()
  string(REGEX REPLACE "^[^ ]*/[^ ]*: *" "" said "${said}")
  string(REGEX REPLACE "/[^ ]*/" "" said "${said}")
  string(REGEX REPLACE "^error: (#error -- )?" "" said "${said}")
  string(REGEX REPLACE "[^A-Za-z0-9 ._:+()=!,/*'-]" "" said "${said}")
  string(SUBSTRING "${said}" 0 160 said)
  get_filename_component(name "${host}" NAME)
  set(${out} "nvcc ${LOWBIT_CUDA_VERSION} with ${name} failed on a test file: ${said}" PARENT_SCOPE)
endfunction()

# ---- how files are compiled --------------------------------------------------------------------------------------------

# What a .cu file is compiled with, as a file for nvcc's --options-file: a change of it compiles everything again. `gencode`
# is -gencode flags. PLAIN: device code is not compressed.
function(_lowbit_cuda_options file gencode)
  cmake_parse_arguments(PARSE_ARGV 2 arg "PLAIN" "" "")
  set(flags ${gencode})
  _lowbit_host_compiler(host)
  list(APPEND flags -std=c++17 -O3 --expt-relaxed-constexpr "-ccbin=\"${host}\"" "-I\"${CMAKE_CURRENT_SOURCE_DIR}/csrc\"")
  # Registers, stack and spills of each kernel, which nvcc_object.cmake keeps beside the object.
  list(APPEND flags -Xptxas=-v)
  # The short form of 12.x can be read by every driver that runs CUDA 12; the smallest one takes a driver for 12.4, which
  # is no condition for 13, whose drivers are all newer.
  if(arg_PLAIN)
    list(APPEND flags --no-compress)
  elseif(LOWBIT_CUDA_VERSION VERSION_LESS 13)
    list(APPEND flags -Xfatbin=-compress-all)
  else()
    list(APPEND flags --compress-mode=size)
  endif()
  if(CMAKE_BUILD_TYPE STREQUAL "Release")
    list(APPEND flags -DNDEBUG)
  else()
    list(APPEND flags -lineinfo)
  endif()
  # g++ sees device code too, with the pragmas that are meant for nvcc.
  foreach(flag IN ITEMS -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -ffp-contract=off -Wall -Wno-unknown-pragmas)
    list(APPEND flags "-Xcompiler=${flag}")
  endforeach()
  if(NOT CMAKE_CURRENT_SOURCE_DIR MATCHES " ")  # nvcc cuts what it hands on at spaces
    list(APPEND flags "-Xcompiler=-fmacro-prefix-map=${CMAKE_CURRENT_SOURCE_DIR}/=")
  endif()
  if(CMAKE_COMPILE_WARNING_AS_ERROR)
    list(APPEND flags -Werror=all-warnings)
  endif()
  list(JOIN flags "\n" text)
  file(CONFIGURE OUTPUT "${file}" CONTENT "${text}\n" @ONLY)
endfunction()

# Objects for some architectures; files that only one of them can run belong in a call of their own.
function(lowbit_cuda_objects out)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "ARCHS;SOURCES")
  list(JOIN arg_ARCHS "_" name)
  set(folder "${CMAKE_CURRENT_BINARY_DIR}/lowbit_cuda")
  set(hopper "")
  if("90a" IN_LIST arg_ARCHS)
    set(hopper "-DLOWBIT_HOPPER")
  endif()
  _lowbit_gencode(each ${arg_ARCHS})
  _lowbit_cuda_options("${folder}/${name}.each.options" "${each};${hopper}")
  # With the macro, using an instruction that is not in every architecture is an error.
  _lowbit_gencode_one_pass(once ${arg_ARCHS})
  _lowbit_cuda_options("${folder}/${name}.once.options" "${once};-DLOWBIT_ONE_PASS;${hopper}")
  _lowbit_gencode(alone 90a)
  _lowbit_cuda_options("${folder}/${name}.hopper.options" "${alone};${hopper}" PLAIN)
  set(objects "")
  foreach(source IN LISTS arg_SOURCES)
    get_filename_component(stem "${source}" NAME_WE)
    set(object "${folder}/${stem}.o")
    set(options "${folder}/${name}.once.options")
    if(stem MATCHES "${LOWBIT_CUDA_HOPPER}")
      if(NOT hopper)
        continue()
      endif()
      set(options "${folder}/${name}.hopper.options")
    elseif(stem MATCHES "${LOWBIT_CUDA_ARCH_DEPENDENT}")
      set(options "${folder}/${name}.each.options")
    endif()
    set(extra "")
    if(stem MATCHES "${LOWBIT_CUDA_EXACT}")
      set(extra -fmad=false)
    endif()
    add_custom_command(
      OUTPUT "${object}"
      BYPRODUCTS "${object}.log"
      COMMAND "${CMAKE_COMMAND}" "-DNVCC=${LOWBIT_NVCC}" "-DOPTIONS=${options}" "-DEXTRA=${extra}" "-DSOURCE=${source}"
              "-DOBJECT=${object}" -P "${CMAKE_CURRENT_SOURCE_DIR}/cmake/nvcc_object.cmake"
      MAIN_DEPENDENCY "${source}"
      DEPENDS "${options}" "${CMAKE_CURRENT_SOURCE_DIR}/cmake/nvcc_object.cmake"
      DEPFILE "${object}.d"
      COMMENT "nvcc ${stem}.cu"
      VERBATIM)
    list(APPEND objects "${object}")
  endforeach()
  set_source_files_properties(${objects} PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)
  set(${out} "${objects}" PARENT_SCOPE)
endfunction()

# ---- the decision ------------------------------------------------------------------------------------------------------

# Sets LOWBIT_NVCC and what depends on it in the caller's scope; `reason` is why the library cannot be built.
macro(_lowbit_look_for_cuda)
  if(APPLE)
    set(reason "there is no CUDA for macOS")
  else()
    _lowbit_find_nvcc(LOWBIT_NVCC)
    if(NOT LOWBIT_NVCC)
      set(reason "nvcc was not found when lowbit was built")
    endif()
  endif()
  if(NOT reason)
    execute_process(COMMAND "${LOWBIT_NVCC}" --version OUTPUT_VARIABLE answer ERROR_VARIABLE answer)
    if(NOT answer MATCHES "release ([0-9]+\\.[0-9]+)")
      set(reason "nvcc --version did not name a release when lowbit was built")
    else()
      set(LOWBIT_CUDA_VERSION "${CMAKE_MATCH_1}")
      if(LOWBIT_CUDA_VERSION VERSION_LESS LOWBIT_CUDA_MINIMUM)
        set(reason "the nvcc found is CUDA ${LOWBIT_CUDA_VERSION}, and lowbit needs ${LOWBIT_CUDA_MINIMUM} or later")
      endif()
    endif()
  endif()
  if(NOT reason)
    execute_process(COMMAND "${LOWBIT_NVCC}" --dryrun -x cu -c /dev/null OUTPUT_VARIABLE answer ERROR_VARIABLE answer)
    string(REGEX MATCHALL "\"-L[^\"]+\"" folders "${answer}")
    list(TRANSFORM folders REPLACE "^\"-L(.*)\"$" "\\1")
    find_library(cudart NAMES cudart_static PATHS ${folders} NO_DEFAULT_PATH NO_CACHE)
    if(NOT cudart)
      set(reason "there is no libcudart_static beside nvcc")
    endif()
    set(LOWBIT_CUDART "${cudart}")
  endif()
endmacro()

function(lowbit_find_cuda)
  set(reason "")
  if(NOT LOWBIT_CUDA MATCHES "^(AUTO|ON|OFF)$")
    lowbit_stop("LOWBIT_CUDA=${LOWBIT_CUDA} is none of AUTO, ON, OFF")
  endif()
  if(LOWBIT_CUDA STREQUAL "OFF")
    set(LOWBIT_CUDA_ABSENT_REASON "lowbit was built with LOWBIT_CUDA=OFF" PARENT_SCOPE)
    return()
  endif()
  _lowbit_look_for_cuda()
  if(NOT reason)
    string(REGEX REPLACE "[, ]+" ";" archs "${LOWBIT_CUDA_ARCHS}")  # pip's front end cuts its own lists at semicolons
    if(archs STREQUAL "all")
      set(archs ${LOWBIT_CUDA_ALL_ARCHS})
    elseif(archs STREQUAL "native")
      _lowbit_native_archs(archs)
      if(NOT archs)
        set(reason "LOWBIT_CUDA_ARCHS=native, and nvidia-smi names no device")
      endif()
    endif()
    if(LOWBIT_CUDA_VERSION VERSION_LESS 12.9)
      list(TRANSFORM archs REPLACE "f" "")  # families came with 12.9; plain machine code for 12.0 runs on all of 12.x
    endif()
  endif()
  if(NOT reason)
    set(options "${CMAKE_CURRENT_BINARY_DIR}/lowbit_cuda_probe/options")
    _lowbit_host_compiler(host)
    _lowbit_gencode(flags ${archs})
    _lowbit_cuda_options("${options}" "${flags}")
    file(SHA1 "${options}" key)
    set(key "${LOWBIT_NVCC} ${LOWBIT_CUDA_VERSION} ${CMAKE_CXX_COMPILER_VERSION} ${key}")
    if(NOT LOWBIT_CUDA_PROBED STREQUAL key)
      _lowbit_probe_nvcc(reason "${options}")
    endif()
    if(NOT reason)
      set(LOWBIT_CUDA_PROBED "${key}" CACHE INTERNAL "What the test file was last compiled with")
    endif()
  endif()
  if(reason AND LOWBIT_CUDA STREQUAL "ON")
    lowbit_stop("LOWBIT_CUDA=ON, but ${reason}" "(CUDACXX names another nvcc than ${LOWBIT_NVCC}, CUDAHOSTCXX a C++ compiler that it takes)")
  endif()
  set(LOWBIT_CUDA_ABSENT_REASON "${reason}" PARENT_SCOPE)
  set(LOWBIT_CUDA_ARCHS_USED "${archs}" PARENT_SCOPE)
  foreach(name LOWBIT_NVCC LOWBIT_CUDA_VERSION LOWBIT_CUDART)
    set(${name} "${${name}}" PARENT_SCOPE)
  endforeach()
endfunction()
