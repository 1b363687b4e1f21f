"""Find the model that probes can read inside what a training loop holds."""

import torch
from torch import nn

from probes.reading.errors import ProbeError


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and DistributedDataParallel; shares its parameters.

    Raises:
        ProbeError: the model is sharded by FSDP, so that no process holds whole weights.
    """
    for module in model.modules():
        if any(
            "FSDP" in kind.__name__ or "FullySharded" in kind.__name__
            for kind in type(module).__mro__
        ):
            raise ProbeError(
                f"{type(module).__name__} shards its parameters (FSDP): no process holds whole "
                "weights to read; watch a copy with gathered weights instead"
            )
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is None and isinstance(
            model, nn.parallel.DistributedDataParallel | nn.DataParallel
        ):
            inner = model.module
        if inner is None:
            return model
        model = inner


def is_observing_process() -> bool:
    """Whether this process looks: the only one, or rank 0 of several."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return True
    return distributed.get_rank() == 0
