"""The C++ kernels; the rest is in pyproject.toml. Without a compiler the install is pure Python and works."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(str(p) for p in Path("csrc").glob("*.cpp"))
HEADERS = sorted(str(p) for p in (*Path("csrc").glob("*.h"), *Path("csrc").glob("*.inl")))

# No -march: the instruction set is chosen at run time. No contraction: a score is one fixed order of operations.
COMPILE = ["-std=c++17", "-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wall"]
# Unset lanes inside the compiler's own headers.
COMPILE += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]


class OptionalExtension(build_ext):
    """Builds what it can and says in one line what it cannot."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # whatever a compiler or its absence raises
            self.give_up(error)

    def build_extension(self, ext) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        reason = " ".join(str(error).split())[:200]
        print(f"cfsfl-fast: the C++ kernels were not built ({reason}); library calls will be used", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


def extensions() -> list:
    try:
        from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
    except ImportError as error:
        print(f"cfsfl-fast: the C++ kernels were not built ({error}); library calls will be used", file=sys.stderr)
        return []
    ParallelCompile("CFSFL_BUILD_JOBS").install()  # all processors, or as many as it says
    return [
        Pybind11Extension(
            "cfsfl_fast._cpp",
            SOURCES,
            depends=HEADERS,
            extra_compile_args=COMPILE,
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": OptionalExtension})
