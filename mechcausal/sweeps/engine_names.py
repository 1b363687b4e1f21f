"""The names of the engines and what goes with each, without what the engines import."""

from typing import Literal

from mechcausal.sweeps.sweep import SweepError

EngineName = Literal["local", "batched", "dask"]


def check_engine_options(
    engine: EngineName, *, workers: int | None, address: str | None, collect: bool
) -> None:
    """Find out whether an engine has what it needs, and nothing that it would ignore.

    Raises:
        SweepError: an option of another engine, or Dask without an address.
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
            "--engine dask needs --address, the scheduler of a Dask cluster of yours, such as "
            "tls://host:8786"
        )
