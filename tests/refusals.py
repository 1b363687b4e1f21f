"""Errors that a user reads: one line each."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def raises_one_line(
    error: type[BaseException] | tuple[type[BaseException], ...], match: str | None = None
) -> Iterator[pytest.ExceptionInfo[BaseException]]:
    """As `pytest.raises`; the message is a single line."""
    with pytest.raises(error, match=match) as caught:
        yield caught
    assert len(str(caught.value).splitlines()) == 1
