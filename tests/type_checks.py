"""Annotations checked at each call, shapes included, at a fraction of the cost of jaxtyping's own.

jaxtyping's import hook decorates every function with `jaxtyping.jaxtyped`, which binds the
arguments and checks them twice, also where no annotation is an array's: it doubles the time of a
short training. This decorator checks each argument and each result once.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_args, get_type_hints

import jaxtyping
from beartype import beartype

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

_context = jaxtyping.jaxtyped


def check_annotations(*packages: str) -> None:
    """Check the annotations of these packages, which must not have been imported yet."""
    jaxtyping.jaxtyped = lambda *, typechecker: checked  # type: ignore[assignment,misc]
    jaxtyping.install_import_hook(packages, "beartype.beartype")


def checked(decorated: Decorated) -> Decorated:
    """The function with its arguments and result checked; axes of one name have one size in it.

    A dataclass has its fields checked when it is made; other classes stay as they are, and so do
    functions inside functions: checks are made anew at each definition, and take milliseconds.
    """
    if inspect.isclass(decorated):
        if dataclasses.is_dataclass(decorated) and "__init__" in vars(decorated):
            decorated.__init__ = checked(decorated.__init__)  # type: ignore[misc,method-assign]
        return decorated
    if "<locals>" in decorated.__qualname__:
        return decorated
    written = decorated.__annotations__.items()
    hints = {name: _readable(hint, decorated.__globals__) for name, hint in written}
    decorated.__annotations__ = hints
    function = beartype(decorated)
    if not any(map(_has_axes, hints.values())):
        return function

    @functools.wraps(function)
    def with_axes(*arguments: Any, **options: Any) -> Any:
        with _context("context"):
            return function(*arguments, **options)

    return with_axes  # type: ignore[return-value]


def _readable(hint: Any, names: Mapping[str, Any]) -> Any:
    """An annotation without strings; `Any` where a string names what is not defined yet."""

    def annotated(value: Any) -> None: ...

    annotated.__annotations__ = {"value": hint}
    try:
        return get_type_hints(annotated, dict(names), include_extras=True)["value"]
    except NameError:
        return Any


def _has_axes(hint: Any) -> bool:
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(_has_axes, get_args(hint)))
