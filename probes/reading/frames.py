"""pandas, which tables need and readings do not."""

from typing import Any

from probes.reading.errors import ProbeError


def pandas() -> Any:
    """The module pandas.

    Raises:
        ProbeError: it is not installed.
    """
    try:
        import pandas as pd  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise ProbeError(
            "a frame needs pandas, which is not installed: pip install pandas"
        ) from None
    return pd
