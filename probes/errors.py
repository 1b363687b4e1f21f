"""The one exception that probes raise: a single line that says what is missing."""


class ProbeError(RuntimeError):
    """A probe cannot be attached to this model, or has nothing to report yet."""
