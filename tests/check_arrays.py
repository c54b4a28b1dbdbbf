"""The run-time check behind jaxtyping's import hook: arrays have the types and shapes that signatures say. Others are mypy's."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

from jaxtyping import AbstractArray, AnnotationError


def check_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
    """Raises TypeError where an argument or the result is no such array as its annotation names."""
    signature = inspect.signature(function)
    hints: dict[str, Any] | None = None

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        nonlocal hints
        if hints is None:
            hints = _array_hints(function)
        arguments = signature.bind(*args, **kwargs).arguments
        for name, hint in hints.items():
            if name in arguments:
                _check(f"{function.__qualname__}: {name}", arguments[name], hint)
        result = function(*args, **kwargs)
        if "return" in hints:
            _check(f"{function.__qualname__}: its result", result, hints["return"])
        return result

    return checked


def _array_hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        hints = typing.get_type_hints(function)
    except NameError:  # a name that is imported for type checkers alone
        return {}
    arrays = ((name, hint) for name, hint in hints.items() if _is_array(hint))
    return dict(sorted(arrays, key=lambda item: "+" in str(item[1]) or "*" in str(item[1])))  # B is known before B+1


def _is_array(hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return all(part is types.NoneType or _is_array(part) for part in hint.__args__)
    return isinstance(hint, type) and issubclass(hint, AbstractArray)


def _check(what: str, value: Any, hint: Any) -> None:
    try:
        is_right = isinstance(value, hint)
    except AnnotationError:  # 2*K, where nothing says what K is
        return
    if not is_right:
        got = f"{value.dtype}{list(value.shape)}" if hasattr(value, "dtype") else type(value).__name__
        raise TypeError(f"{what} must be {hint}; got {got}")
