"""Hooks that are gone after a block, whatever happened in it and whenever it was interrupted.

Ctrl-C may come between any two steps, also between the making of a hook and the storing of its
handle. So what is going to be hooked is written down first, and a hook is removed by looking for
itself on the module: that it may not be there yet, or not any more, is no error.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeAlias

from torch import nn

Hook: TypeAlias = Callable[..., Any]


class Hooks:
    """Forward hooks for the length of a `with` block; several blocks may end in any order.

    `add` and `finally_call` inside the block, or before it, decide what the end of it takes back.
    """

    def __init__(self) -> None:
        self._hooked: list[tuple[nn.Module, Hook]] = []
        self._calls: list[Callable[[], None]] = []

    def add(self, module: nn.Module, hook: Hook) -> None:
        """Call `hook(module, inputs, output)` after every forward pass of a module."""
        hook = _unique(hook)
        self._hooked.append((module, hook))
        module.register_forward_hook(hook)

    def add_before(self, module: nn.Module, hook: Hook) -> None:
        """Call `hook(module, args, kwargs)` before every forward pass of a module."""
        hook = _unique(hook)
        self._hooked.append((module, hook))
        module.register_forward_pre_hook(hook, with_kwargs=True)

    def finally_call(self, call: Callable[[], None]) -> None:
        """Make a call at the end, which may be made twice."""
        self._calls.append(call)

    def remove(self) -> None:
        """Take everything back; a second time does nothing."""
        # An entry is forgotten only when it is done: an interrupted removal can be taken up again.
        while self._hooked:
            _take_off(*self._hooked[-1])
            self._hooked.pop()
        while self._calls:
            self._calls[-1]()
            self._calls.pop()

    def __enter__(self) -> "Hooks":
        """The hooks themselves."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take everything back."""
        try:
            self.remove()
        finally:  # once more after Ctrl-C in the middle of it
            self.remove()

    def __del__(self) -> None:
        # Ctrl-C on the very step that enters or leaves a block: Python then calls no __exit__.
        self.remove()


def _unique(hook: Hook) -> Hook:
    """A new function, so that the same hook on the same module twice are two."""

    def call(*arguments: Any) -> Any:
        return hook(*arguments)

    return call


def _take_off(module: nn.Module, hook: Hook) -> None:
    for place, with_kwargs in (
        (module._forward_hooks, module._forward_hooks_with_kwargs),
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
    ):
        for number in [number for number, found in place.items() if found is hook]:
            with_kwargs.pop(number, None)
            place.pop(number, None)
