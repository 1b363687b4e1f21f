"""A model's fingerprint: whatever a probe may leave behind shows in it."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# The attributes in which torch and TransformerLens keep the hooks of a module.
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
    "fwd_hooks",
    "bwd_hooks",
)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Hooks, gradients, modes, flags and values of a model, and what torch keeps globally."""
    modules = dict(model.named_modules())
    original = getattr(model, "original_model", None)
    if isinstance(original, nn.Module):  # a bridge keeps it outside of its own tree
        modules |= {f"original.{name}": part for name, part in original.named_modules()}
    state: dict[str, Any] = {}
    for name, module in modules.items():
        for attribute in _HOOKS:
            hooks = getattr(module, attribute, ())
            state[f"{name}: {attribute}"] = list(hooks) if isinstance(hooks, dict) else len(hooks)
        state[f"{name}: training"] = module.training
    for name, parameter in model.named_parameters():
        state[f"{name}: value"] = parameter.detach().double().sum().item()
        state[f"{name}: trained"] = parameter.requires_grad
        gradient = parameter.grad
        state[f"{name}: grad"] = None if gradient is None else gradient.double().sum().item()
        state[f"{name}: hooks"] = len(parameter._backward_hooks or ())
    config: Any = getattr(model, "cfg", None)
    if config is not None:
        state["config"] = {key: str(value) for key, value in vars(config).items()}
    state["grad enabled"] = torch.is_grad_enabled()
    state["generator"] = torch.get_rng_state().sum().item()
    return state


def changed(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """The entries of a fingerprint that an earlier one had otherwise."""
    return {key: value for key, value in now.items() if value != before.get(key)}


@contextmanager
def left_as_found(*models: nn.Module) -> Iterator[None]:
    """Check that the block, however it ends, leaves the models as they were."""
    before = [fingerprint(model) for model in models]
    try:
        yield
    finally:
        for model, earlier in zip(models, before, strict=True):
            assert changed(fingerprint(model), earlier) == {}


def interrupted(work: Callable[[], object], *, after: float) -> bool:
    """Do some work over and over until Ctrl-C comes after some seconds; whether it was met.

    Python itself drops an interrupt that meets a finalizer or the callback of a weak reference:
    the work then goes on to its end.
    """
    sent = threading.Event()

    def press() -> None:
        time.sleep(after)
        signal.raise_signal(signal.SIGINT)
        sent.set()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=press)
    try:
        thread.start()
        while not sent.is_set():
            work()
        thread.join()
    except KeyboardInterrupt:
        return True
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    return False
