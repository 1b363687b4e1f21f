"""Forward hooks that last for a `with` block."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Hooks:
    """Forward hooks for the length of a `with` block; several blocks may end in any order.

    The end of the block, also by an exception, removes every hook added before or inside it.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def add(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, inputs, output)` after every forward pass of a module."""
        self._handles.append(module.register_forward_hook(hook))

    def add_before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, kwargs)` before every forward pass of a module."""
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def edit(self, point: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the activation of a hook point; `change` sees TransformerLens's layout."""

        def hook(module: nn.Module, inputs: tuple[Any, ...], activation: Tensor) -> Any:
            changed = change(converted(point, activation))
            conversion: Any = getattr(point, "hook_conversion", None)
            return changed if conversion is None else conversion.revert(changed)

        self.add(point, hook)

    def remove(self) -> None:
        """Remove the hooks; a second time does nothing."""
        while self._handles:
            self._handles[-1].remove()
            self._handles.pop()

    def __enter__(self) -> Any:
        """The hooks themselves."""
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the hooks."""
        try:
            self.remove()
        finally:  # Ctrl-C may have interrupted the first call
            self.remove()

    def __del__(self) -> None:
        # Python skips __exit__ if Ctrl-C comes just as a block is entered or left.
        self.remove()


def converted(point: nn.Module, activation: Tensor) -> Tensor:
    """The activation in TransformerLens's layout; some hook points of bridges use another one."""
    conversion: Any = getattr(point, "hook_conversion", None)
    values: Tensor = activation if conversion is None else conversion.convert(activation)
    return values
