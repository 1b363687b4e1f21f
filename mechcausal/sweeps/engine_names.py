"""The engines' names and options, in a module that imports quickly."""

from typing import Literal, get_args

from mechcausal.sweeps.sweep import SweepError

EngineName = Literal["local", "dask"]
BATCHED = "--engine batched is now the option --batch, which goes with any engine"


def check_engine_options(
    engine: str, *, workers: int | None, address: str | None, collect: bool
) -> None:
    """Check that every option given belongs to the engine, and that Dask has an address.

    Raises:
        SweepError: no such engine, an option of another engine, or no address for Dask.
    """
    if engine not in get_args(EngineName):
        raise SweepError(BATCHED if engine == "batched" else f"--engine {engine}: local or dask")
    for option, is_given, owner in (
        ("address", address is not None, "dask"),
        ("collect", collect, "dask"),
        ("workers", workers is not None, "local"),
    ):
        if is_given and engine != owner:
            raise SweepError(f"--{option} belongs to --engine {owner}, found {engine}")
    if engine == "dask" and not address:
        raise SweepError(
            "--engine dask needs --address, the address of your Dask scheduler, such as "
            "tls://host:8786"
        )
