"""Forward hooks that a `with` block always removes, also when Ctrl-C interrupts it.

Ctrl-C may come at any point, also between registering a hook and storing its handle. `Hooks`
therefore lists a hook before registering it, and removes it by searching the module for it: a hook
that was not registered yet, or is already removed, is no error.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeAlias

from torch import Tensor, nn

Hook: TypeAlias = Callable[..., Any]


class Hooks:
    """Forward hooks for the length of a `with` block; several blocks may end in any order.

    The end of the block removes every hook added before or inside it and makes every call that was
    passed to `finally_call`.
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
        """Make a call at the end of the block; an interrupted end may make it twice."""
        self._calls.append(call)

    def remove(self) -> None:
        """Remove the hooks and make the final calls; a second time does nothing."""
        # An entry leaves its list only once it is done, so an interrupted removal can be resumed.
        while self._hooked:
            _remove_hook(*self._hooked[-1])
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
        """Remove the hooks and make the final calls."""
        try:
            self.remove()
        finally:  # Ctrl-C may have interrupted the first call
            self.remove()

    def __del__(self) -> None:
        # Python skips __exit__ if Ctrl-C comes just as a block is entered or left.
        self.remove()


def _unique(hook: Hook) -> Hook:
    """A new function that calls the hook: the same hook may then be added to a module twice."""

    def call(*arguments: Any) -> Any:
        return hook(*arguments)

    return call


def _remove_hook(module: nn.Module, hook: Hook) -> None:
    for registered, with_kwargs in (
        (module._forward_hooks, module._forward_hooks_with_kwargs),
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
    ):
        for number in [number for number, other in registered.items() if other is hook]:
            with_kwargs.pop(number, None)
            registered.pop(number, None)


def converted(point: nn.Module, activation: Tensor) -> Tensor:
    """The activation in TransformerLens's layout; some hook points of bridges use another one."""
    conversion: Any = getattr(point, "hook_conversion", None)
    values: Tensor = activation if conversion is None else conversion.convert(activation)
    return values


def reverted(point: nn.Module, values: Tensor) -> Tensor:
    """The inverse of `converted`: values in the layout of the hook point itself."""
    conversion: Any = getattr(point, "hook_conversion", None)
    activation: Tensor = values if conversion is None else conversion.revert(values)
    return activation
