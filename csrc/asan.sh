#!/bin/sh
# Builds the kernels with the address and undefined-behaviour sanitizers and runs the tests of the operations on them.
set -eu
cd "$(dirname "$0")/.."
out=build/asan
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g"
mkdir -p $out
CFLAGS="$flags" CXXFLAGS="$flags" LDFLAGS="$flags" \
    "${PYTHON:-python}" setup.py -q build_ext --force --build-lib $out --build-temp $out/objects
rm -f $out/cfsfl_fast/*.py
cp -L cfsfl_fast/*.py $out/cfsfl_fast/
mkdir -p $out/cfsfl_fast/kernels && cp kernels/__init__.py $out/cfsfl_fast/kernels/
cd $out
for library in libasan.so libubsan.so libstdc++.so; do
    preload="${preload:-} $(${CXX:-g++} -print-file-name=$library)"
done
LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=. "${PYTHON:-python}" -m pytest -q -p no:cacheprovider \
    ../../tests/test_cpp.py ../../tests/test_row_bag.py ../../tests/test_linear_topk.py ../../tests/test_linear_nll.py \
    ../../tests/test_feedback_step.py -k "not compiler and not openmp" "$@"
