"""
What GRPO has generated and not trained on yet, in its checkpoints.

TRL generates for `steps_per_generation` × `num_iterations` micro-batches at once and forgets what is left of them at a
resume. A checkpoint between two generations keeps it, a file a process.
"""

from pathlib import Path

import torch
from accelerate.utils import send_to_device
from trl import GRPOTrainer

from adamba.errors import UserError


def save_generation(trainer: GRPOTrainer, checkpoint: Path) -> None:
    """Write what this process has left, if anything."""
    if trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations):
        kept = {"layout": _layout(trainer), "step": trainer._step, "batches": trainer._buffered_inputs}
        torch.save(kept, _file(trainer, checkpoint))


def load_generation(trainer: GRPOTrainer, checkpoint: Path) -> None:
    """
    Go on with what was left.

    Raises:
        UserError: the rows of this run's processes and batches are other ones.
    """
    if not any(checkpoint.glob("generation_*.pt")):
        return
    file = _file(trainer, checkpoint)
    kept = torch.load(file, map_location="cpu", weights_only=True) if file.is_file() else {"layout": None}
    if kept["layout"] != _layout(trainer):
        raise UserError(
            f"resume_from_checkpoint: {checkpoint} lies between two generations and goes on only with as many "
            f"processes, rows and accumulated batches as it was saved with, or take one with no generation_*.pt in it"
        )
    trainer._step = kept["step"]
    trainer._buffered_inputs = send_to_device(kept["batches"], trainer.accelerator.device)


def _layout(trainer: GRPOTrainer) -> list[int]:
    """How rows spread over processes and batches."""
    args = trainer.args
    return [args.world_size, args.per_device_train_batch_size, args.gradient_accumulation_steps]


def _file(trainer: GRPOTrainer, checkpoint: Path) -> Path:
    return checkpoint / f"generation_{trainer.args.process_index}.pt"
