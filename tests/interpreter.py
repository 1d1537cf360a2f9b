"""Triton's interpreter, made quick enough for a test run; import it before anything imports Triton.

Every call of a jitted function patches all of `triton.language` and walks its members to find what to patch. They never
change, so one walk is enough: ten times faster on kernels of many small functions.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"


def remember_builtins() -> None:
    """Looks the members of `triton.language` up once, where this version's interpreter is known to look them up each
    time."""
    from triton.runtime import interpreter

    names: dict[Any, list[str]] = {}
    patch_attr, is_builtin = interpreter._patch_attr, interpreter.tl.core.is_builtin

    def patch_builtin(pkg: Any, builder: Any, *scope: Any) -> None:
        if pkg not in names:
            names[pkg] = [name for name in dir(pkg) if is_builtin(getattr(pkg, name, None))]
        for name in names[pkg]:
            member = getattr(pkg, name)
            if is_builtin(member):
                patch_attr(pkg, name, member, builder, *scope)

    interpreter._patch_builtin = patch_builtin


with contextlib.suppress(ImportError, AttributeError):
    remember_builtins()
