# find_package(lowbit): the libraries that hold the ops, for C++ programs that call them through PyTorch's dispatcher.
#
#   lowbit::ops    schemas and CPU kernels
#   lowbit::cuda   CUDA kernels; only where they are installed, and for programs that link a CUDA build of PyTorch
#
# Installed beside the libraries, in lowbit/cmake; `python -c "import lowbit; print(lowbit.cmake_dir())"` prints where.
# PyTorch is the caller's to find and link: find_package(Torch), or the folders of an installed torch.

get_filename_component(_lowbit_libraries "${CMAKE_CURRENT_LIST_DIR}/.." ABSOLUTE)
set(_lowbit_suffix ".so")
if(APPLE)
  set(_lowbit_suffix ".dylib")
endif()

foreach(_lowbit_name ops cuda)
  set(_lowbit_library "${_lowbit_libraries}/liblowbit_${_lowbit_name}${_lowbit_suffix}")
  if(EXISTS "${_lowbit_library}" AND NOT TARGET lowbit::${_lowbit_name})
    add_library(lowbit::${_lowbit_name} SHARED IMPORTED)
    set_target_properties(lowbit::${_lowbit_name} PROPERTIES IMPORTED_LOCATION "${_lowbit_library}")
    if(NOT APPLE)
      # Loading a library is what registers its ops. A program calls nothing in it by name, so a linker that drops what
      # seems unused, as many do by default, would drop it.
      set_target_properties(lowbit::${_lowbit_name} PROPERTIES INTERFACE_LINK_OPTIONS "LINKER:--no-as-needed")
    endif()
  endif()
endforeach()

if(TARGET lowbit::cuda)
  set_property(TARGET lowbit::cuda PROPERTY INTERFACE_LINK_LIBRARIES lowbit::ops)
endif()
if(NOT TARGET lowbit::ops)
  set(lowbit_FOUND FALSE)
  set(lowbit_NOT_FOUND_MESSAGE "there is no liblowbit_ops${_lowbit_suffix} in ${_lowbit_libraries}: install lowbit again")
endif()

unset(_lowbit_libraries)
unset(_lowbit_library)
unset(_lowbit_name)
unset(_lowbit_suffix)
