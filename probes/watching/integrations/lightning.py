"""Track a run of Lightning.

Example::

    from probes.watching.integrations.lightning import TrackerCallback

    trainer = Trainer(callbacks=[TrackerCallback(lambda module: module.model, held_out, every=200)])
    trainer.fit(module, loader)
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import Int
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from probes.watching.tracker import Tracker


class TrackerCallback(Callback):
    """Looks at a LightningModule's model after every due optimizer step; logs to its loggers.

    Looks are saved in Lightning's checkpoints and restored from them.

    Attributes:
        tracker: the tracker; None before training begins.
    """

    def __init__(
        self,
        model_of: Callable[[Any], nn.Module],
        tokens: Int[Tensor, "sequence pos"],
        *,
        every: int,
        **options: Any,
    ) -> None:
        """Prepare to track.

        Args:
            model_of: gives the transformer inside the LightningModule.
            tokens: held-out sequences.
            every: optimizer steps between looks; gradient accumulation does not matter.
            **options: of `Tracker`.
        """
        self._model_of, self._tokens, self._every = model_of, tokens, every
        self._options = options
        self._restored: dict[str, Any] | None = None
        self.tracker: Tracker | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Set up the tracker, with the looks of the checkpoint, and look at the first step."""
        if self.tracker is None:
            options = {"log": lambda row: _log(trainer, row), **self._options}
            model = self._model_of(pl_module)
            self.tracker = Tracker(model, self._tokens, every=self._every, **options)
        if self._restored is not None:
            self.tracker.load_state_dict(self._restored)
            self._restored = None
        self.tracker(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Look, if an optimizer step was made and is due."""
        if self.tracker is not None:
            self.tracker(trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """The looks so far, for Lightning's checkpoint."""
        return {} if self.tracker is None else self.tracker.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the looks of a checkpoint until training starts."""
        self._restored = state_dict or None


def _log(trainer: Any, row: dict[str, float]) -> None:
    step = int(row["step"])
    for logger in trainer.loggers:
        logger.log_metrics(row, step=step)
