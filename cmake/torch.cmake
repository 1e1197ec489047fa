# Finds the installed torch without find_package(Torch): with a CUDA build of torch that call insists on a CUDA
# toolkit even where nothing here needs one. Only headers and libtorch_cpu are needed, so the folder is enough.
#
#   lowbit_find_torch()  ->  LOWBIT_TORCH_DIR, LOWBIT_TORCH_VERSION, and the imported target lowbit::torch
#
# LOWBIT_TORCH_DIR (CMake or environment) names the folder outright: the one that holds include/, lib/, version.py.

set(LOWBIT_TORCH_MINIMUM 2.11)

# Prints torch's folder, without importing torch (seconds, and it may touch a GPU driver).
set(_lowbit_where_is_torch [[
import importlib.util, os
spec = importlib.util.find_spec("torch")
print(os.path.dirname(spec.origin) if spec and spec.origin else "")
]])

# Under pip's build isolation plain `python -c` sees the build environment only, which holds no torch. `python -I`
# ignores PYTHONPATH, pip's means of isolation, and so sees the environment that lowbit is being installed into.
function(_lowbit_ask_python out)
  foreach(isolated "" "-I")
    execute_process(
      COMMAND "${Python_EXECUTABLE}" ${isolated} -c "${_lowbit_where_is_torch}"
      OUTPUT_VARIABLE folder
      OUTPUT_STRIP_TRAILING_WHITESPACE
      ERROR_QUIET)
    if(folder AND EXISTS "${folder}/version.py")
      file(TO_CMAKE_PATH "${folder}" folder)
      set(${out} "${folder}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
  set(${out} "" PARENT_SCOPE)
endfunction()

function(lowbit_find_torch)
  set(dir "${LOWBIT_TORCH_DIR}")
  if(NOT dir)
    set(dir "$ENV{LOWBIT_TORCH_DIR}")
  endif()
  if(NOT dir)
    _lowbit_ask_python(dir)
  endif()
  if(NOT dir)
    lowbit_stop(
      "lowbit builds against an installed PyTorch and found none. Run: pip install 'torch>=${LOWBIT_TORCH_MINIMUM}'"
      "(asked ${Python_EXECUTABLE}. uv and `python -m build` hide an installed one: use --no-build-isolation, or set LOWBIT_TORCH_DIR)")
  endif()

  set(given "${LOWBIT_TORCH_DIR}")
  unset(LOWBIT_TORCH_DIR CACHE)  # a folder that fails one of these checks is not remembered for the next run
  if(NOT EXISTS "${dir}/version.py")
    lowbit_stop("LOWBIT_TORCH_DIR=${dir} is not an installed torch: it has no version.py")
  endif()

  file(STRINGS "${dir}/version.py" line REGEX "^__version__ *=" LIMIT_COUNT 1)
  string(REGEX MATCH "[0-9]+\\.[0-9]+(\\.[0-9]+)?" version "${line}")
  if(version VERSION_LESS LOWBIT_TORCH_MINIMUM)
    lowbit_stop(
      "lowbit needs torch >= ${LOWBIT_TORCH_MINIMUM} and found ${version} in ${dir}. Run: pip install --upgrade 'torch>=${LOWBIT_TORCH_MINIMUM}'")
  endif()
  find_library(library NAMES torch_cpu PATHS "${dir}/lib" NO_DEFAULT_PATH NO_CACHE)
  if(NOT library OR NOT EXISTS "${dir}/include/torch/csrc/stable/library.h")
    lowbit_stop(
      "the torch in ${dir} lacks lib/libtorch_cpu or include/torch/csrc/stable. Run: pip install --force-reinstall 'torch>=${LOWBIT_TORCH_MINIMUM}'")
  endif()

  if(given)
    set(LOWBIT_TORCH_DIR "${given}" CACHE PATH "torch's folder; empty: ask Python")
  endif()

  add_library(lowbit::torch SHARED IMPORTED)
  set_target_properties(lowbit::torch PROPERTIES
    IMPORTED_LOCATION "${library}"
    INTERFACE_INCLUDE_DIRECTORIES "${dir}/include"
    INTERFACE_SYSTEM_INCLUDE_DIRECTORIES "${dir}/include")
  set(LOWBIT_TORCH_DIR "${dir}" PARENT_SCOPE)
  set(LOWBIT_TORCH_VERSION "${version}" PARENT_SCOPE)
endfunction()
