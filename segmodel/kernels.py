"""Functions that numba compiles when they are first called, and keeps on disk where it can."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

_Function = TypeVar("_Function", bound=Callable[..., Any])


def kernel(function: _Function) -> _Function:
    """Compile without the interpreter's lock, and with the order and rounding of every operation kept."""
    return compiled(function, error_model="numpy")


def inlined(function: _Function) -> _Function:
    """Compile likewise, as a part of whatever kernel calls it."""
    return compiled(function, error_model="numpy", inline="always")


def compiled(function: _Function, **options: Any) -> _Function:
    """Compile with numba's options, without the interpreter's lock.

    What comes out lies in `NUMBA_CACHE_DIR`, else beside the source, else in the user's cache. Where no
    such folder can be written, numba would refuse; here each process then compiles for itself.
    """
    try:
        made = numba.njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:
        made = numba.njit(nogil=True, **options)(function)
    return cast("_Function", made)
