"""The engines' names and options, in a module that imports quickly."""

from typing import Literal

from mechcausal.sweeps.sweep import SweepError

EngineName = Literal["local", "batched", "dask"]


def check_engine_options(
    engine: EngineName, *, workers: int | None, address: str | None, collect: bool
) -> None:
    """Check that every option given belongs to the engine, and that Dask has an address.

    Raises:
        SweepError: an option of another engine, or no address for Dask.
    """
    dask = ("dask",)
    for option, is_given, engines in (
        ("address", address is not None, dask),
        ("collect", collect, dask),
        ("workers", workers is not None, ("local", "batched")),
    ):
        if is_given and engine not in engines:
            raise SweepError(
                f"--{option} belongs to --engine {' or '.join(engines)}, found {engine}"
            )
    if engine == "dask" and not address:
        raise SweepError(
            "--engine dask needs --address, the address of your Dask scheduler, such as "
            "tls://host:8786"
        )
