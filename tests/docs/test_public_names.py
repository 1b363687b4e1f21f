"""Every public name of both packages loads."""

import pytest

import mechcausal
import probes


@pytest.mark.parametrize("package", [mechcausal, probes], ids=lambda package: package.__name__)
def test_every_public_name_loads(package: object) -> None:
    missing = [name for name in package.__all__ if not hasattr(package, name)]  # type: ignore[attr-defined]
    assert package.__all__  # type: ignore[attr-defined]
    assert not missing
