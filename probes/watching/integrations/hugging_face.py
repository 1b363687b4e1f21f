"""Track a run of the Hugging Face Trainer.

Example::

    from probes.watching.integrations.hugging_face import TrackerCallback

    trainer = Trainer(model=model, args=arguments, train_dataset=dataset)
    trainer.add_callback(TrackerCallback(trainer, held_out, every=200))
    trainer.train()
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import TrainerCallback

from probes.watching.tracker import Tracker
from probes.watching.unwrap import is_observing_process

STATE_FILE = "probes_tracker.pt"


class TrackerCallback(TrainerCallback):
    """Looks at the Trainer's model after every due optimizer step, and logs through the Trainer.

    Looks are saved with every checkpoint and restored from it.

    Attributes:
        tracker: the tracker; None before training begins.
    """

    def __init__(
        self, trainer: Any, tokens: Int[Tensor, "sequence pos"], *, every: int, **options: Any
    ) -> None:
        """Prepare to track.

        Args:
            trainer: the Trainer, whose `log` receives the figures unless `log` is an option.
            tokens: held-out sequences.
            every: optimizer steps between looks; gradient accumulation does not matter.
            **options: of `Tracker`.
        """
        self._trainer, self._tokens, self._every = trainer, tokens, every
        self._options = {"log": trainer.log, "step_key": "global_step", **options}
        self.tracker: Tracker | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set up the tracker, restore its looks when the run is resumed, and look at step 0."""
        if self.tracker is None:
            self.tracker = Tracker(
                kwargs["model"],
                self._tokens,
                every=self._every,
                tokenizer=kwargs.get("processing_class"),
                **self._options,
            )
        checkpoint = _state_file(args, state)
        if checkpoint.is_file() and not self.tracker.looks:
            self.tracker.load_state_dict(torch.load(checkpoint, weights_only=True))
        self.tracker(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look, if this step is due."""
        if self.tracker is not None:
            self.tracker(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the looks beside the checkpoint that was just written."""
        if self.tracker is not None and is_observing_process():
            torch.save(self.tracker.state_dict(), _state_file(args, state))


def _state_file(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE
