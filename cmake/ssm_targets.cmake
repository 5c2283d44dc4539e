# The build's vocabulary: ssm_sources, ssm_op, ssm_test, ssm_bench, ssm_fuzz.

# Compile and link options of everything built here.
add_library(ssm_options INTERFACE)
if(SSM_DEV)
  target_compile_options(
    ssm_options INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wpedantic;-Wshadow;-Werror;-Wno-unknown-pragmas>"
                          $<$<COMPILE_LANGUAGE:CXX>:-Wno-missing-field-initializers>
                          "$<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings;-Xcompiler=-Wall,-Wshadow>")
endif()
if(SSM_SANITIZE)
  target_compile_options(ssm_options INTERFACE -fsanitize=${SSM_SANITIZE} -fno-omit-frame-pointer
                                               -fno-sanitize-recover=all)
  target_link_options(ssm_options INTERFACE -fsanitize=${SSM_SANITIZE})
endif()

function(ssm_dependencies)
  find_package(OpenMP REQUIRED)
  find_package(fmt REQUIRED)
  find_package(nlohmann_json REQUIRED)
  find_package(PkgConfig REQUIRED)
  pkg_check_modules(hwy REQUIRED IMPORTED_TARGET libhwy)
  pkg_check_modules(pcre2 REQUIRED IMPORTED_TARGET libpcre2-8)
  pkg_check_modules(utf8proc REQUIRED IMPORTED_TARGET libutf8proc)
  pkg_check_modules(zstd REQUIRED IMPORTED_TARGET libzstd)
  target_include_directories(ssm PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}>
                                        $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
  target_compile_features(ssm PUBLIC cxx_std_20)
  target_link_libraries(ssm PUBLIC fmt::fmt OpenMP::OpenMP_CXX
                            PRIVATE $<BUILD_INTERFACE:ssm_options> nlohmann_json::nlohmann_json
                                    PkgConfig::hwy PkgConfig::pcre2 PkgConfig::utf8proc PkgConfig::zstd)
  if(SSM_ONEDNN)
    find_package(dnnl REQUIRED)
    target_link_libraries(ssm PRIVATE DNNL::dnnl)
    target_compile_definitions(ssm PRIVATE SSM_HAS_ONEDNN=1)
  endif()
  if(SSM_CUDA)
    find_package(CUDAToolkit REQUIRED)
    # PUBLIC: device.h says what this build can drive.
    target_compile_definitions(ssm PUBLIC SSM_HAS_CUDA=1)
    # fmt 9 switches constexpr off for nvcc, which in C++20 does not compile.
    target_compile_options(ssm PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr;-lineinfo;-DFMT_USE_CONSTEXPR=1>")
    target_link_libraries(ssm PRIVATE CUDA::cudart_static CUDA::cublasLt)
  endif()
  # Of Highway's x86 targets keep the baseline, AVX2 and AVX-512: SSSE3 and SSE4 add compile time, not speed.
  # Under sanitizers AVX2 alone: the same source, and each target of it takes minutes there.
  if(SSM_SANITIZE)
    target_compile_definitions(ssm PRIVATE "HWY_DISABLED_TARGETS=(HWY_SSSE3|HWY_SSE4|HWY_AVX3)")
  else()
    target_compile_definitions(ssm PRIVATE "HWY_DISABLED_TARGETS=(HWY_SSSE3|HWY_SSE4)")
  endif()
endfunction()

# ssm_sources(dir files...): adds files to the library; *.h among them are public headers.
function(ssm_sources)
  foreach(file ${ARGN})
    cmake_path(ABSOLUTE_PATH file OUTPUT_VARIABLE path)
    if(file MATCHES "\\.h$")
      target_sources(ssm PUBLIC FILE_SET HEADERS BASE_DIRS ${PROJECT_SOURCE_DIR} FILES ${path})
    else()
      target_sources(ssm PRIVATE ${path})
      if(SSM_SANITIZE AND file MATCHES "_cpu\\.cpp$")
        # Kernels: AddressSanitizer only. With UBSan g++ 12 takes over ten minutes for one of these files.
        set_source_files_properties(${path} TARGET_DIRECTORY ssm PROPERTIES COMPILE_OPTIONS -fno-sanitize=undefined)
      endif()
    endif()
  endforeach()
endfunction()

# ssm_test(file.cpp [LABELS ...] [LIBRARIES ...]): one test program, its cases discovered by ctest.
function(ssm_test file)
  if(NOT SSM_DEV)
    return()
  endif()
  cmake_parse_arguments(arg "" "" "LABELS;LIBRARIES" ${ARGN})
  cmake_path(GET file STEM name)
  add_executable(${name} ${file})
  target_link_libraries(${name} PRIVATE ssm::ssm ssm_options GTest::gtest_main nlohmann_json::nlohmann_json
                                        ${arg_LIBRARIES})
  target_compile_definitions(${name} PRIVATE SSM_SOURCE_DIR="${PROJECT_SOURCE_DIR}")
  # Threads that wait sleep: where several tests share the cores, spinning ones cost 80 times the time.
  set(properties ENVIRONMENT OMP_WAIT_POLICY=PASSIVE)
  if(arg_LABELS)
    list(APPEND properties LABELS "${arg_LABELS}")
  endif()
  gtest_discover_tests(${name} DISCOVERY_TIMEOUT 60 PROPERTIES ${properties})
endfunction()

# ssm_bench(file.cpp): one Google Benchmark program; it refuses to time a wrong answer.
function(ssm_bench file)
  if(NOT SSM_DEV)
    return()
  endif()
  cmake_path(GET file STEM name)
  add_executable(${name} ${file})
  target_link_libraries(${name} PRIVATE ssm::ssm ssm_options benchmark::benchmark_main)
  target_compile_definitions(${name} PRIVATE SSM_SOURCE_DIR="${PROJECT_SOURCE_DIR}")
endfunction()

# ssm_fuzz(file.cpp): a libFuzzer target.
function(ssm_fuzz file)
  if(NOT SSM_FUZZ)
    return()
  endif()
  cmake_path(GET file STEM name)
  add_executable(${name} ${file})
  target_link_options(${name} PRIVATE -fsanitize=fuzzer)
  target_link_libraries(${name} PRIVATE ssm::ssm ssm_options nlohmann_json::nlohmann_json)
endfunction()

# ssm_op(name): the operator in ssm/ops/name: contract, front, CPU kernel, and where present its private
# header, CUDA kernels with their test, test and benchmark.
function(ssm_op name)
  set(dir ${CMAKE_CURRENT_SOURCE_DIR}/${name})
  ssm_sources(${dir}/${name}.h)
  foreach(suffix .cpp _cpu.cpp _backward_cpu.cpp)
    if(EXISTS ${dir}/${name}${suffix})
      ssm_sources(${dir}/${name}${suffix})
    endif()
  endforeach()
  if(SSM_CUDA AND EXISTS ${dir}/${name}_cuda.cu)
    ssm_sources(${dir}/${name}_cuda.cu)
    if(EXISTS ${dir}/${name}_backward_cuda.cu)
      ssm_sources(${dir}/${name}_backward_cuda.cu)
    endif()
    if(EXISTS ${dir}/${name}_cuda_test.cpp)
      ssm_test(${dir}/${name}_cuda_test.cpp LABELS gpu LIBRARIES CUDA::cudart_static)
    endif()
    if(EXISTS ${dir}/${name}_cuda_bench.cpp)
      ssm_bench(${dir}/${name}_cuda_bench.cpp)
      target_link_libraries(${name}_cuda_bench PRIVATE CUDA::cudart_static)
    endif()
  endif()
  if(EXISTS ${dir}/${name}_test.cpp)
    ssm_test(${dir}/${name}_test.cpp)
  endif()
  if(EXISTS ${dir}/${name}_bench.cpp)
    ssm_bench(${dir}/${name}_bench.cpp)
  endif()
endfunction()

function(ssm_install)
  include(CMakePackageConfigHelpers)
  install(TARGETS ssm EXPORT ssmTargets FILE_SET HEADERS)
  install(EXPORT ssmTargets NAMESPACE ssm:: DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/ssm)
  configure_package_config_file(cmake/ssmConfig.cmake.in ssmConfig.cmake
                                INSTALL_DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/ssm)
  write_basic_package_version_file(ssmConfigVersion.cmake COMPATIBILITY SameMinorVersion)
  install(FILES ${PROJECT_BINARY_DIR}/ssmConfig.cmake ${PROJECT_BINARY_DIR}/ssmConfigVersion.cmake
          DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/ssm)
endfunction()
