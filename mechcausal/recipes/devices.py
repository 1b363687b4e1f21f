"""The device and the CPU threads of a run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mechcausal.recipes import RecipeError


@contextmanager
def computing_on(count: int) -> Iterator[None]:
    """Set the number of torch's CPU threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_named(name: str) -> torch.device:
    """The torch device of that name.

    Raises:
        RecipeError: an unknown name, or a device that this machine does not have.
    """
    unknown = f"device: {name} is no device; allowed: cpu, cuda, cuda:N"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RecipeError(unknown) from None
    if device.type not in ("cpu", "cuda"):
        raise RecipeError(unknown)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            available = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
            raise RecipeError(f"device: {name} is not there; available: {available}")
    return device
