"""
Change a checkpoint's shape and keep its function: insert Mamba-2 layers, expand the width, sort by importance, slice.

    accelerate launch src/run_surgery.py recipes/tiny/phase0.yaml
    python src/run_surgery.py --operation slice --model_name_or_path checkpoints/tiny/phase2 --width 32 \
        --output_dir checkpoints/tiny/slice32 --mix pydoc_topics=1.0

States after every layer and logits are compared on real tokens, at every width; beyond 1e-4 nothing is saved. A large
checkpoint goes from disk to disk, tensor by tensor (key `streaming`); killed and started again, it goes on.
"""

from adamba.kept_help import print_kept_help

if __name__ == "__main__":
    print_kept_help()  # before the imports below, which take seconds

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from adamba.data.arguments import DataArguments
from adamba.disk import check_output_dir
from adamba.errors import UserError, one_line, user_errors
from adamba.hub import HubArguments, hub_target, push_run
from adamba.loading import ModelArguments, check_length
from adamba.loading_streamed import load_or_open
from adamba.operations import SurgeryArguments, at_once, check_rows, plan, sort, verify
from adamba.output_folder import check_output_folder
from adamba.publish import publish, surgery_dir
from adamba.recipe import parse
from adamba.surgery.fetching import Together, attach
from adamba.surgery.rules import apply, empty_model
from adamba.surgery.streaming import Weights, num_weight_bytes, stream
from adamba.training.session import logger, peak_memory_bytes, setup_logging


@user_errors()
def main() -> None:
    model_args, data_args, hub_args, args, recipe = parse(
        ModelArguments, DataArguments, HubArguments, SurgeryArguments
    )
    if os.environ.get("RANK", "0") != "0":
        return  # launched as training is: the first process does it alone
    setup_logging()
    check_output_folder(args.output_dir, recipe.values)
    target = hub_target(hub_args, args.output_dir)
    started = time.monotonic()
    before, tokenizer, weights = load_or_open(model_args, args.streaming)
    before.eval()
    check_length(before, args.max_length)
    rows = check_rows(data_args, tokenizer, args)
    metrics: dict[str, Any] = {}  # filled before they are published

    def finish(after, together: Together | None = None) -> None:
        metrics.update(verify(before, after, surgery, args, rows, together))
        metrics.update(num_parameters=after.num_parameters(), hidden_size=after.config.hidden_size)
        metrics.update(surgery_seconds=time.monotonic() - started, peak_memory_bytes=peak_memory_bytes())

    def remove_unfinished() -> None:
        shutil.rmtree(unfinished, ignore_errors=True)
        with suppress(OSError):  # something else lies there
            unfinished.parent.rmdir()

    def write(folder: Path) -> None:
        """Nothing stays of what failed; what was killed goes on in the next run, with the files that are whole."""
        try:
            begun, cpu_begun = time.monotonic(), time.process_time()
            after = stream(surgery, before, weights, folder, unfinished)
            metrics.update(write_seconds=time.monotonic() - begun, write_cpu_seconds=time.process_time() - cpu_begun)
            together = at_once(before, after.config, args, rows)
            attach(before, weights.as_dtype(torch.float32), together)
            finish(attach(empty_model(after.config), Weights(unfinished, torch.float32), together), together)
            for file in unfinished.iterdir():
                file.rename(folder / file.name)
            remove_unfinished()
        except Exception:
            shutil.rmtree(folder, ignore_errors=True)
            remove_unfinished()
            raise

    try:
        surgery = None if args.operation == "sort" else plan(before, args)
        size = num_weight_bytes(
            before if surgery is None else empty_model(surgery.config), getattr(torch, model_args.dtype)
        )
        if weights is not None:
            unfinished = surgery_dir(args.output_dir, recipe, {"model": str(weights.folder)})
            size -= sum(file.stat().st_size for file in unfinished.glob("*"))
        check_output_dir(args.output_dir, size)
        source: Any = write
        if weights is None:
            source = sort(before, rows) if surgery is None else apply(surgery, before)
            finish(source)
        publish(source, tokenizer, args.output_dir, recipe, metrics, {"model": str(model_args.model_name_or_path)})
    except (OSError, SafetensorError) as error:
        raise UserError(f"output_dir: {args.output_dir}: {one_line(error)}; what was there is unchanged") from error
    except (ValueError, StrictDataclassError) as error:
        raise UserError(f"{recipe.path or 'command line'}: {one_line(error)}") from error
    logger.info("wrote %s: %d parameters", Path(args.output_dir), metrics["num_parameters"])
    if target is not None:
        logger.info("pushed to %s", push_run(args.output_dir, target))


if __name__ == "__main__":
    main()
