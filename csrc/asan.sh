#!/bin/sh
# Builds the kernels with the address and undefined-behaviour sanitizers and runs the tests of the operations on them.
# Arguments go to pytest.
set -eu
cd "$(dirname "$0")/.."
out=build/asan
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g"
rm -rf $out/cfsfl_fast
mkdir -p $out
CFLAGS="$flags" CXXFLAGS="$flags" LDFLAGS="$flags" \
    python setup.py -q build_ext --force --build-lib $out --build-temp $out/objects
ls $out/cfsfl_fast/_cpp*
cp -L cfsfl_fast/*.py $out/cfsfl_fast/
mkdir $out/cfsfl_fast/kernels
cp kernels/*.py $out/cfsfl_fast/kernels/
cd $out
preload=
for library in libasan.so libubsan.so libstdc++.so; do
    preload="$preload $(${CXX:-g++} -print-file-name=$library)"
done
tests=../../tests
LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=. \
    python -m pytest -q -p no:cacheprovider -k "not compiler and not openmp and not environment" $tests/test_cpp.py \
    $tests/test_row_bag.py $tests/test_linear_topk.py $tests/test_linear_nll.py $tests/test_feedback_step.py "$@"
