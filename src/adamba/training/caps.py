"""
Hours and dollars that a run may take: `max_hours` and `max_cost_usd` stop it before the next step would cross them,
with a checkpoint from which it goes on once the cap is raised.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from transformers import TrainerCallback, TrainingArguments

from adamba.disk import write_whole
from adamba.errors import UserError

SPENT_FILE = "spent.json"  # beside the run's checkpoint-N folders: what earlier starts of it have used


# No subclass of `TrainingArguments`: its fields would put their defaults over those of TRL's configs.
@dataclass
class SpendingCaps:
    """Put before a class of `TrainingArguments`. Caps change no result: raising one goes on with the same run."""

    max_hours: float | None = field(
        default=None, metadata={"help": "Wall-clock hours, restarts and preparation included, at which the run stops."}
    )
    max_cost_usd: float | None = field(
        default=None, metadata={"help": "Dollars at which the run stops: hours x processes x usd_per_gpu_hour."}
    )
    usd_per_gpu_hour: float | None = field(default=None, metadata={"help": "Price of one process's device."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("max_hours", "max_cost_usd", "usd_per_gpu_hour"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise UserError(f"{key}: {value:g} must be above 0")
        if self.max_cost_usd is not None and self.usd_per_gpu_hour is None:
            raise UserError(f"max_cost_usd: {self.max_cost_usd:g} needs usd_per_gpu_hour, the price of one device")

    @property
    def max_seconds(self) -> float:
        """The tighter of both caps."""
        by_hours = float("inf") if self.max_hours is None else self.max_hours * 3600
        by_cost = float("inf") if self.max_cost_usd is None else self.max_cost_usd / self.usd_per_second
        return min(by_hours, by_cost)

    @property
    def usd_per_second(self) -> float:
        return (self.usd_per_gpu_hour or 0.0) * self.world_size / 3600

    def describe_cap(self, seconds: float) -> str:
        """Which cap, and what was used of it."""
        used = f"{seconds / 3600:.3g} h"
        if self.usd_per_gpu_hour is not None:
            used += f", ${seconds * self.usd_per_second:.3g}"
        by_cost = self.max_cost_usd is not None and self.max_cost_usd / self.usd_per_second <= self.max_seconds
        key = "max_cost_usd" if by_cost else "max_hours"
        return f"{key}: {getattr(self, key):g} is used up ({used} so far)"


def refuse_used_up(args: TrainingArguments) -> None:
    """
    Before anything is loaded: has this run already used what it may, so that its next step would be too much?

    Raises:
        UserError: yes; its checkpoint is kept.
    """
    if not isinstance(args, SpendingCaps):
        return
    spent, next_step = read_spent(args.output_dir)
    if spent + next_step > args.max_seconds:
        raise UserError(f"{args.describe_cap(spent)}; raise it to go on from the checkpoint kept in {args.output_dir}")


def read_spent(trainer_dir: str | None) -> tuple[float, float]:
    """Seconds that earlier starts of the run have used, and those of a step."""
    file = Path(str(trainer_dir)) / SPENT_FILE
    if not file.is_file():
        return 0.0, 0.0
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return float(record["seconds"]), float(record["step_seconds"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: not what a run wrote; remove it to count from 0") from None


class StopAtCap(TrainerCallback):
    """Counts from the start of the process. `stopped` says why, once the cap has stopped the run."""

    def __init__(self, args: SpendingCaps) -> None:
        self.args = args
        self.before, self.step_seconds = read_spent(args.output_dir)
        self.step_began = time.time()
        self.stopped: str | None = None

    def seconds(self) -> float:
        """Used so far, by all starts of this run; the same on every rank."""
        return self._longest(self.before + time.time() - psutil.Process().create_time())

    def _longest(self, seconds: float) -> float:
        """Of all ranks."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            longest = torch.tensor(seconds, dtype=torch.float32, device=self.args.device)
            torch.distributed.all_reduce(longest, torch.distributed.ReduceOp.MAX)
            seconds = longest.item()
        return seconds

    def on_step_begin(self, args, state, control, **kwargs):
        self.step_began = time.time()

    def on_step_end(self, args, state, control, **kwargs):
        self.step_seconds = time.time() - self.step_began
        if self.args.max_seconds == float("inf"):
            return control
        # Both as the slowest has them: were one rank to stop alone, the others would wait for it for ever.
        used, self.step_seconds = self.seconds(), self._longest(self.step_seconds)
        if used + self.step_seconds > self.args.max_seconds and state.global_step < state.max_steps:
            self.stopped = self.args.describe_cap(used)
            control.should_save = control.should_log = control.should_training_stop = True
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.args.usd_per_gpu_hour is not None and state.log_history:
            cost = {"cost_usd": self.seconds() * self.args.usd_per_second}
            state.log_history[-1] |= cost
            (logs if logs is not None else {}).update(cost)
        self._remember(state)

    def on_save(self, args, state, control, **kwargs):
        self._remember(state)

    def _remember(self, state) -> None:
        if state.is_world_process_zero:
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            used = self.before + time.time() - psutil.Process().create_time()
            record = {"seconds": round(used, 3), "step_seconds": round(self.step_seconds, 3)}
            write_whole(folder / SPENT_FILE, json.dumps(record) + "\n")
