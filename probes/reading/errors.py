"""What probes raise and warn with: a single line that says what is missing."""


class ProbeError(RuntimeError):
    """A probe cannot be attached to this model, or has nothing to report yet."""


class ProbeWarning(UserWarning):
    """Something that probes offer does not hold on this model or in this pass."""
