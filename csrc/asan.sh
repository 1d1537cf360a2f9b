#!/bin/sh
# Builds the kernels with the address and undefined-behaviour sanitizers and runs the tests of the operations on them.
# Arguments go to pytest.
set -eu
cd "$(dirname "$0")/.."
out=build/asan
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g"
rm -rf $out/cfsfl_fast $out/tests
mkdir -p $out
cp -RL cfsfl_fast tests $out/  # pytest puts the folder of the tests first in the path: the package must be the one there
rm -f $out/cfsfl_fast/_cpp*.so
CFLAGS="$flags" CXXFLAGS="$flags" LDFLAGS="$flags" \
    python setup.py -q build_ext --force --build-lib $out --build-temp $out/objects
cd $out
cat > sanitized.py <<'END'
"""A plugin of pytest: the kernels that were tested are those that were built here."""
from pathlib import Path


def pytest_sessionfinish():
    from cfsfl_fast import _cpp

    assert Path(_cpp.__file__).resolve().is_relative_to(Path.cwd()), f"{_cpp.__file__} was tested, which is not sanitized"
END
preload=
for library in libasan.so libubsan.so libstdc++.so; do
    preload="$preload $(${CXX:-g++} -print-file-name=$library)"
done
LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=. \
    python -m pytest -q -p no:cacheprovider -p sanitized -k "not compiler and not openmp and not environment" \
    tests/test_cpp.py tests/test_row_bag.py tests/test_linear_topk.py tests/test_linear_nll.py \
    tests/test_feedback_step.py tests/test_baselines.py::test_slims_columns_are_the_non_negative_elastic_nets \
    tests/test_baselines.py::test_slim_is_scikit_learns_elastic_net tests/test_fuzz.py::test_kernels "$@"
