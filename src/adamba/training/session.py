"""What every training script does around `trainer.train()`: quiet libraries, resume, measure, publish."""

import logging
import math
import resource
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import unwrap_peft_model
from transformers.utils import is_liger_kernel_available

from adamba.disk import check_output_dir
from adamba.errors import UserError
from adamba.fingerprint import run_fingerprint
from adamba.flops import (
    adapter_flops_per_token,
    elastic_flops_per_token,
    flops_per_token,
    training_flops_per_token,
)
from adamba.gpus import rated_flops_per_second
from adamba.hub import hub_target, push_run
from adamba.model import AdambaConfig, AdambaForCausalLM
from adamba.model.kernels_adamba import loads
from adamba.output_folder import check_output_folder
from adamba.publish import publish, trainer_dir
from adamba.recipe import Recipe
from adamba.secrets_kept import RedactingFilter
from adamba.training.caps import SpendingCaps, StopAtCap, refuse_used_up
from adamba.training.checkpoints import checkpoint_to_resume, differences, refuse_foreign, seal_what_is_saved, sign
from adamba.training.compiling import compile_layers, take_over_compilation
from adamba.training.interruptions import Interruptions
from adamba.training.sharding import (
    copy_model,
    count_weights,
    is_sharded,
    num_weights,
    readable_checkpoint,
    save_whole,
    saved_by,
)

logger = logging.getLogger("adamba")


def start(args: TrainingArguments, recipe: Recipe, inputs: Mapping[str, str]) -> Path:
    """
    Seed and set up the log, and give the Trainer a working folder of its own. Returns the folder that the recipe
    named, where `finish` publishes.

    Raises:
        UserError: what would only show after hours: no output_dir, a checkpoint of another run, a cap that is used up,
            a Hub that cannot be written to.
    """
    setup_logging(is_main_process=args.process_index == 0)
    set_seed(args.seed)
    if args.label_smoothing_factor:
        raise UserError(
            f"label_smoothing_factor: {args.label_smoothing_factor} would change nothing, none of the losses here has "
            f"it; leave it out"
        )
    if args.ddp_find_unused_parameters is None:
        # Every weight that learns has a gradient in every step (`freeze_idle`). Searching would take a micro-batch
        # with several passes, and a router that runs beside them, for several steps.
        args.ddp_find_unused_parameters = False
    if args.ddp_broadcast_buffers is None:
        # No buffer changes while a model learns. Sending them before each pass would leave processes waiting for each
        # other where one has more passes: a batch with rows of two roles, each under its own adapter, beside one.
        args.ddp_broadcast_buffers = False
    if not args.output_dir or args.output_dir == "trainer_output":
        raise UserError("output_dir: missing; name the folder for the checkpoint")
    published = Path(args.output_dir)
    check_output_folder(published, recipe.values)
    folder = trainer_dir(published, recipe, inputs)
    args.output_dir = str(folder)
    if args.process_index == 0:
        parts = run_fingerprint(recipe.code, recipe.values, inputs)
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        record = {"code": parts["code"], "inputs": parts["inputs"], "values": recipe.values, "rows_per_step": rows}
        if changed := differences(folder, record):
            raise UserError(
                f"output_dir: {folder} was trained by another number of processes ({'; '.join(changed)}); keep it, or "
                f"give batch sizes with the same rows per step and that folder as resume_from_checkpoint"
            )
        for other in folder.parent.glob("*/checkpoint-*") if not folder.exists() else ():
            found = differences(other.parent, record)
            if found:
                logger.info("starting anew; %s is of another run (%s)", other, "; ".join(found))
        if args.save_strategy != "no" or args.resume_from_checkpoint:
            sign(folder, record)
        refuse_foreign(args.resume_from_checkpoint, folder)
    refuse_used_up(args)
    take_over_compilation(args)
    args.hub_target = hub_target(args, published) if args.process_index == 0 else None
    args.push_to_hub = False  # the Trainer's own push sends every checkpoint; `finish` sends what is published
    return published


def checkpoint_bytes(trainer: Trainer) -> int:
    """What one checkpoint takes on disk, about: weights, and two moments in fp32 for each that learns."""
    parameters = list(trainer.model.parameters())
    weights = sum(num_weights(p) * p.element_size() for p in parameters)
    return weights + sum(8 * num_weights(p) for p in parameters if p.requires_grad)


def check_space(trainer: Trainer) -> None:
    """Refuse a disk that cannot hold the checkpoints that will be kept at once, and the published one."""
    args, folder = trainer.args, Path(trainer.args.output_dir)
    size, kept = checkpoint_bytes(trainer), 0
    if args.save_strategy != "no":
        saves = args.max_steps / args.save_steps if args.save_steps >= 1 else 1 / args.save_steps
        kept = max(1, min(args.save_total_limit or int(saves), int(saves))) + 1  # one goes once the next is whole
    present = sum(file.stat().st_size for file in folder.glob("checkpoint-*/**/*") if file.is_file())
    needed = max(kept * size - present, 0)
    needed += sum(num_weights(p) * p.element_size() for p in trainer.model.parameters())
    check_output_dir(folder, needed, f"{kept} checkpoints and the result")


def setup_logging(is_main_process: bool = True) -> None:
    """Our lines on stderr, once; from libraries errors only (without kernels the torch paths run, as documented)."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        if not any(isinstance(found, RedactingFilter) for found in handler.filters):
            handler.addFilter(RedactingFilter())
    logger.setLevel(logging.INFO if is_main_process else logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


class StopWhenBroken(TrainerCallback):
    """Stops a run whose loss or gradient is no longer finite, before a checkpoint of it can replace a good one."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save  # nothing is saved unseen
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        for key in ("loss",) if args.fp16 else ("loss", "grad_norm"):  # fp16's loss scaling skips infinite gradients
            if not math.isfinite((logs or {}).get(key, 0.0)):
                raise UserError(
                    f"learning_rate: {args.learning_rate:g} is too high, {key} became {logs[key]} by step "
                    f"{state.global_step}; the last good checkpoint is kept in {args.output_dir}"
                )


def tell_missing_kernels(trainer: Trainer) -> None:
    """On a GPU, one line when Mamba layers must do without their kernels; a step was seen to take 1.8 × as long."""
    if trainer.args.device.type != "cuda" or not isinstance(trainer.model, AdambaForCausalLM):
        return
    missing = [package for package in ("mamba_ssm", "causal_conv1d") if not loads(package)]
    if missing:
        logger.info(
            "%s: not installed, too old or built for another torch; Mamba layers run in plain torch, "
            'which takes longer (pip install -c constraints.txt -e ".[gpu]" --no-build-isolation)',
            " and ".join(missing),
        )


def check_liger(trainer: Trainer) -> None:
    """
    Raises:
        UserError: `use_liger_kernel` for a hybrid, of which Liger would replace nothing and say nothing; or no Liger.
    """
    if not getattr(trainer.args, "use_liger_kernel", False):
        return
    model = unwrap_peft_model(trainer.model)
    if isinstance(model, AdambaForCausalLM):
        raise UserError("use_liger_kernel: Liger has no kernels for a hybrid; leave it out")
    if not is_liger_kernel_available():
        raise UserError("use_liger_kernel: liger-kernel is not installed; pip install liger-kernel, or leave it out")


def train(trainer: Trainer) -> dict[str, float]:
    """
    Train, from the last complete checkpoint of this very run if there is one. Returns what was measured; after a
    resume, `train_seconds` is what the whole run would have taken at the speed of the steps that were run here.

    Raises:
        UserError: the loss is not a finite number, or a cap is reached (the last good checkpoint stays); a checkpoint
            of another run was named; the disk is too small, or full.
        SystemExit: 143 after SIGTERM, 130 after SIGINT, with a checkpoint of the last step.
    """
    check_liger(trainer)
    save_whole(trainer)
    seal_what_is_saved(trainer)
    tell_missing_kernels(trainer)
    compile_layers(trainer.model, trainer.args)
    resume = checkpoint_to_resume(trainer)
    resumed_step = 0
    if resume is not None:
        logger.info("resuming from %s", resume)
        saved = TrainerState.load_from_json(str(Path(resume) / TRAINER_STATE_NAME))
        resumed_step = saved.global_step
        if hasattr(trainer, "count_on"):
            trainer.count_on(saved)
        if resumed_step >= saved.max_steps or getattr(trainer, "is_at_budget", False):
            return _take_over(trainer, resume, saved)
    if trainer.is_world_process_zero():
        check_space(trainer)
    trainer.args.logging_nan_inf_filter = False  # it would show the last good loss instead of a broken one
    interruptions = Interruptions(trainer)
    trainer.add_callback(interruptions)
    trainer.add_callback(StopWhenBroken())  # after the other: what it saves is looked at too
    cap = StopAtCap(trainer.args) if isinstance(trainer.args, SpendingCaps) else None
    if cap is not None:
        trainer.add_callback(cap)
    started = time.monotonic()
    readable = nullcontext() if resume is None else readable_checkpoint(trainer, resume)
    with interruptions.heard(), readable as resume:
        result = trainer.train(resume_from_checkpoint=resume)
    steps = trainer.state.global_step
    if interruptions.stopped_by is not None:
        logger.info(
            "stopped by %s after step %d; the same command goes on from there", interruptions.stopped_by.name, steps
        )
        raise SystemExit(128 + interruptions.stopped_by)
    if cap is not None and cap.stopped:
        raise UserError(
            f"{cap.stopped}; stopped after step {steps} of {trainer.state.max_steps}, raise it to go on from the "
            f"checkpoint kept in {trainer.args.output_dir}"
        )
    seconds = (time.monotonic() - started) * steps / max(steps - resumed_step, 1)
    trained = {"train_loss": result.training_loss, "train_seconds": seconds, "train_steps": steps}
    if cap is not None and trainer.args.usd_per_gpu_hour is not None:
        trained["cost_usd"] = cap.seconds() * trainer.args.usd_per_second
    return trained


def _take_over(trainer: Trainer, checkpoint: str, saved: TrainerState) -> dict[str, float]:
    """
    A run that was stopped after its last step but before it was published, or is started again when its
    `max_generated_tokens` are generated. `Trainer.train` would do a step more.
    """
    if trainer.args.load_best_model_at_end and saved.best_model_checkpoint:
        checkpoint = saved.best_model_checkpoint  # as `Trainer.train` ends
    by_fsdp = saved_by(Path(checkpoint))[0] == "FSDP"  # the Trainer would read it under FSDP only
    if isinstance(trainer.model, PeftModel) and is_sharded(trainer):
        raise UserError(
            f"resume_from_checkpoint: {checkpoint} ends this run, and sharding takes no adapters without training; "
            f"one process publishes it, with a per_device_train_batch_size of the same rows per step"
        )
    if isinstance(trainer.model, PeftModel) and by_fsdp:
        trainer.model.load_adapter(checkpoint, trainer.model.active_adapter, is_trainable=True)
    elif is_sharded(trainer) or by_fsdp:  # the model is whole in the checkpoint, and sharded nowhere else yet
        trainer.save_model = lambda folder: copy_model(trainer, checkpoint, folder)
    else:
        trainer._load_from_checkpoint(checkpoint)
    trainer.state = saved
    losses = [entry["loss"] for entry in saved.log_history if "loss" in entry]
    loss = sum(losses) / len(losses) if losses else math.nan
    return {"train_loss": loss, "train_seconds": math.nan, "train_steps": saved.global_step}


def measures(trainer: Trainer, seconds: float, tokens_seen: int, context_length: int) -> dict[str, float]:
    """Size, tokens, speed and memory of a run, for `metrics.json`."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    train_flops = tokens_seen * training_flops(trainer, model.config, context_length)
    rated = rated_flops_per_second(product_precision(trainer, model)) * trainer.args.world_size
    return {
        "num_parameters": count_weights(model),
        "num_trainable_parameters": num_adapter_weights(trainer) or count_weights(model, only_trainable=True),
        "hidden_size": model.config.hidden_size,
        "tokens_seen": tokens_seen,
        "tokens_per_second": tokens_seen / max(seconds, 1e-9),
        "train_flops": train_flops,
        **({"mfu": train_flops / max(seconds, 1e-9) / rated} if rated else {}),
        "peak_memory_bytes": peak_memory_bytes(),
        **({"peak_gpu_memory_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_initialized() else {}),
    }


def product_precision(trainer: Trainer, model: torch.nn.Module) -> str:
    """What a GPU multiplies matrices in, as `Gpu.tflops_in` names it."""
    halves = (torch.bfloat16, torch.float16)
    if trainer.args.bf16 or trainer.args.fp16 or next(model.parameters()).dtype in halves:
        return "bf16"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "fp32"


def training_flops(trainer: Trainer, config: Any, context_length: int) -> float:
    """Forward and backward FLOPs a token of what this trainer's recipe asks for (`adamba.flops`)."""
    elastic = getattr(trainer, "elastic_args", None)
    if elastic is None or not elastic.elastic:
        asks_reference = hasattr(trainer, "ref_model") and bool(getattr(trainer.args, "beta", 0.0))
        reference = flops_per_token(config, None, context_length) if asks_reference else 0.0
        if num_adapter_weights(trainer) and isinstance(config, AdambaConfig):
            return adapter_flops_per_token(config, context_length) + reference
        train_only = getattr(trainer.args, "train_only", "all")
        return training_flops_per_token(config, context_length, train_only) + reference
    options = (elastic.width_weights, elastic.num_sampled_widths, elastic.distill, elastic.num_sampled_exits)
    return elastic_flops_per_token(config, context_length, *options)


def num_adapter_weights(trainer: Trainer) -> int:
    """How many weights of LoRA adapters learned, merged by now or not; 0 without."""
    if isinstance(trainer.model, PeftModel):
        return count_weights(trainer.model, only_trainable=True)
    return getattr(trainer, "num_adapter_weights", 0)


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def finish(
    trainer: Trainer,
    tokenizer: Any,
    output_dir: Path,
    recipe: Recipe,
    metrics: Mapping[str, Any],
    inputs: Mapping[str, str],
) -> None:
    """Publish the checkpoint, complete or not at all, and push it if the recipe says so."""
    config = trainer.model.config
    config.use_cache = getattr(trainer.model, "published_use_cache", config.use_cache)
    publish(trainer, tokenizer, output_dir, recipe, dict(metrics), inputs)
    if trainer.is_world_process_zero():
        logger.info("wrote %s", output_dir)
        if (target := getattr(trainer.args, "hub_target", None)) is not None:
            logger.info("pushed to %s", push_run(output_dir, target))
