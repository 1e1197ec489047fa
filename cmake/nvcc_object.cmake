# One .cu file to one object file. Run by the build, with -DNVCC -DOPTIONS -DEXTRA -DSOURCE -DOBJECT.
#
# What the assembler says of each kernel (registers, stack, spills) goes to OBJECT.log, where tests/test_cuda_library.py
# reads it; warnings and errors go to the terminal.

set(ENV{LC_ALL} C)
execute_process(
  COMMAND "${NVCC}" --options-file "${OPTIONS}" ${EXTRA} -MD -MF "${OBJECT}.d" -MT "${OBJECT}" -c "${SOURCE}" -o "${OBJECT}"
  RESULT_VARIABLE status
  OUTPUT_VARIABLE said
  ERROR_VARIABLE said)
file(WRITE "${OBJECT}.log" "${said}")
string(REGEX REPLACE "ptxas info[^\n]*\n" "" said "${said}")
string(REGEX REPLACE " +[0-9]+ bytes stack frame[^\n]*\n" "" said "${said}")
string(STRIP "${said}" said)
if(said)
  message(NOTICE "${said}")
endif()
if(NOT status EQUAL 0)
  file(REMOVE "${OBJECT}")
  message(FATAL_ERROR "nvcc could not compile ${SOURCE}")
endif()
