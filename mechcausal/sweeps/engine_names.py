"""The names of the engines, without what the engines import."""

from typing import Literal

EngineName = Literal["local", "batched", "dask"]
