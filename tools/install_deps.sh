#!/usr/bin/env bash
# Installs the Debian packages that building needs, and nothing when all are there. With `dev`: also what tests,
# sanitizers, fuzzers and formatting need. Recommended packages are left out, so two that CMake asks for are named:
# OpenCL's headers (find_package(dnnl) requires them) and clang's OpenMP.
set -euo pipefail

packages=(g++ cmake ninja-build pkg-config libdnnl-dev ocl-icd-opencl-dev libhwy-dev nlohmann-json3-dev
          libcli11-dev libfmt-dev libpcre2-dev libutf8proc-dev libzstd-dev)
if [[ ${1:-} == dev ]]; then
    packages+=(libgtest-dev libbenchmark-dev clang clang-format clang-tidy libclang-rt-dev libomp-dev python3 zstd)
fi

missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f='${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
done
if [[ ${#missing[@]} -eq 0 ]]; then
    exit 0
fi
echo "installing: ${missing[*]}"
sudo=()
[[ $(id -u) -eq 0 ]] || sudo=(sudo)
"${sudo[@]}" apt-get update -qq
"${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
