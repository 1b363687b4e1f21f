"""The error and the warning of probes; both messages are one line."""


class ProbeError(RuntimeError):
    """A probe cannot read this model or these tokens, or has no reading yet."""


class ProbeWarning(UserWarning):
    """A reading may be wrong on this model or in this pass."""
