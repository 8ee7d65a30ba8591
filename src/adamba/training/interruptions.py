"""SIGTERM and SIGINT end a run after its present step, with a checkpoint; SIGUSR1 saves one and goes on."""

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from transformers import Trainer, TrainerCallback

logger = logging.getLogger("adamba")

STOPPING = (signal.SIGTERM, signal.SIGINT)
NOTHING, SAVE, STOP = 0, 1, 2
# torchrun hands a signal on to its processes, which a scheduler has told already: within this it is the same.
ECHO_SECONDS = 5.0


class Interruptions(TrainerCallback):
    """
    Notes signals and acts on them between two steps. A signal to any process counts for all: they save together and
    stop after the same step. A second SIGTERM or SIGINT ends the process at once, unless a launcher echoes the
    first.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.wanted = NOTHING
        self.stopped_by: signal.Signals | None = None
        self._first_stop: float | None = None  # when it came
        self._previous: dict[signal.Signals, object] = {}

    @contextmanager
    def heard(self) -> Iterator[None]:
        """The signals are this object's while the block runs."""
        self._previous = {number: signal.signal(number, self._note) for number in (*STOPPING, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in self._previous.items():
                signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.wanted = max(self.wanted, SAVE)
            return
        if self._first_stop is None:
            self.wanted, self.stopped_by, self._first_stop = STOP, signal.Signals(number), time.monotonic()
        elif "TORCHELASTIC_RUN_ID" not in os.environ or time.monotonic() - self._first_stop > ECHO_SECONDS:
            for stopping in STOPPING:
                signal.signal(stopping, self._previous[stopping])  # type: ignore[arg-type]
            signal.raise_signal(number)

    def on_step_end(self, args, state, control, **kwargs):
        wanted = self._agreed()
        if wanted == SAVE:
            logger.info("SIGUSR1: saving a checkpoint at step %d", state.global_step)
            self.wanted = NOTHING
        if wanted == STOP and state.global_step < state.max_steps:  # the last step is published instead
            self.stopped_by = self.stopped_by or signal.SIGTERM
            control.should_training_stop = True
        elif wanted == STOP:
            self.stopped_by = None
        control.should_save |= wanted != NOTHING
        return control

    def _agreed(self) -> int:
        if self.trainer.args.world_size == 1:
            return self.wanted
        wanted = torch.tensor(self.wanted, device=self.trainer.accelerator.device)
        torch.distributed.all_reduce(wanted, op=torch.distributed.ReduceOp.MAX)
        return int(wanted)
