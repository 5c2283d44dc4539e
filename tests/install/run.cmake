# cmake -DBUILD=... -DSOURCE=... -P run.cmake: installs the build into a fresh prefix, then configures, builds and
# runs the consumer against it.
set(prefix ${BUILD}/install_consumer/prefix)
file(REMOVE_RECURSE ${BUILD}/install_consumer)
foreach(command
    "${CMAKE_COMMAND};--install;${BUILD};--prefix;${prefix}"
    "${CMAKE_COMMAND};-G;Ninja;-S;${SOURCE};-B;${BUILD}/install_consumer/build;-DCMAKE_PREFIX_PATH=${prefix};-DCMAKE_BUILD_TYPE=Release"
    "${CMAKE_COMMAND};--build;${BUILD}/install_consumer/build"
    "${BUILD}/install_consumer/build/consumer")
  execute_process(COMMAND ${command} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${command}\n${output}")
  endif()
endforeach()
message(STATUS "${output}")
