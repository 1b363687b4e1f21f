"""Annotations checked at each call, shapes included, at a fraction of the cost of jaxtyping's own.

jaxtyping's import hook decorates every function with `jaxtyping.jaxtyped`, which binds the
arguments and checks them twice, also where no annotation is an array's: it doubles the time of a
short training. This decorator checks each argument and each result once.
"""

import dataclasses
import functools
import inspect
import types
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

    A dataclass has its fields checked when it is made; other classes stay as they are.
    """
    if inspect.isclass(decorated):
        if dataclasses.is_dataclass(decorated) and "__init__" in vars(decorated):
            decorated.__init__ = checked(decorated.__init__)  # type: ignore[misc,method-assign]
        return decorated
    known = _known.get((decorated.__module__, decorated.__code__))
    function: Decorated
    if known is not None and known.written == decorated.__annotations__:
        decorated.__annotations__ = known.hints
        function = known.around(decorated)
    else:
        written = decorated.__annotations__
        hints = {name: _readable(hint, decorated.__globals__) for name, hint in written.items()}
        decorated.__annotations__ = hints
        function = beartype(decorated)
        known = _Known(written, hints, any(map(_has_axes, hints.values())), function)
        if "<locals>" in decorated.__qualname__ and known.is_reusable:
            _known[decorated.__module__, decorated.__code__] = known
    if not known.has_axes:
        return function

    @functools.wraps(function)
    def with_axes(*arguments: Any, **options: Any) -> Any:
        with _context("context"):
            return function(*arguments, **options)

    return with_axes  # type: ignore[return-value]


_CHECKED = "__beartype_func"
"""The keyword default by which a wrapper that beartype made knows what it wraps."""


@dataclasses.dataclass(frozen=True)
class _Known:
    """What was made of a function inside another one, which is defined again at each call of that.

    Attributes:
        written: its annotations.
        hints: the same without strings.
        has_axes: whether one of them is an array's.
        wrapper: the function with its arguments and result checked. Making one takes milliseconds,
            most of the time of many a short function.
    """

    written: dict[str, Any]
    hints: dict[str, Any]
    has_axes: bool
    wrapper: Any

    @property
    def is_reusable(self) -> bool:
        return _CHECKED in (getattr(self.wrapper, "__kwdefaults__", None) or {})

    def around(self, function: Any) -> Any:
        """The same wrapper of the function's newest definition."""
        made = self.wrapper
        copy = types.FunctionType(
            made.__code__, made.__globals__, made.__name__, made.__defaults__, made.__closure__
        )
        copy.__kwdefaults__ = made.__kwdefaults__ | {_CHECKED: function}
        return functools.update_wrapper(copy, function)


_known: dict[tuple[str, types.CodeType], _Known] = {}


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
