"""Checkpoints that are opened rather than loaded: a model without weights, and its tensors by name, still on disk."""

import logging
from pathlib import Path

import psutil
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adamba.disk import GB
from adamba.errors import UserError, one_line
from adamba.loading import (
    MAX_REASON,
    SMOLLM2,
    ModelArguments,
    check_checkpoint,
    grow_vocabulary,
    load_model_and_tokenizer,
    load_tokenizer,
    match_vocabulary,
)
from adamba.surgery.rules import empty_model
from adamba.surgery.streaming import Weights, empty_from_folder

logger = logging.getLogger("adamba")

# Bytes in memory for each byte of the old checkpoint: twice the width is four times the weights, in the old model's
# place and beside it, and bfloat16 files may become float32. Below that, holding both models is faster.
GROWTH = 10


def checkpoint_folder(args: ModelArguments) -> Path | None:
    """Where the run's checkpoint lies on this disk, fetched from the Hub if need be; `None` if it is no checkpoint."""
    name = args.model_name_or_path
    if name is None or name == SMOLLM2:
        return None
    check_checkpoint(name)
    if Path(name).is_dir():
        return Path(name)
    try:
        wanted = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
        return Path(snapshot_download(name, revision=args.revision, allow_patterns=wanted))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UserError(f"{name}: cannot be loaded: {one_line(error)[:MAX_REASON]}") from error


def open_checkpoint(args: ModelArguments, folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Weights]:
    """
    `loading.load_model_and_tokenizer` for streaming: nothing but the configuration and the files' headers is read.

    Raises:
        UserError: a folder that is missing, truncated or foreign.
    """
    tokenizer = load_tokenizer(args)
    try:
        model = empty_from_folder(folder)
        weights = Weights(folder, getattr(torch, args.dtype))
        weights.check(model)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise UserError(f"{args.model_name_or_path}: cannot be streamed: {one_line(error)[:MAX_REASON]}") from error
    if args.add_chat_tokens and len(tokenizer) > model.config.vocab_size:
        tables = {"model.embed_tokens.weight", "lm_head.weight"}
        for name in tables:
            module = model.get_submodule(name.removesuffix(".weight"))
            module.weight = torch.nn.Parameter(weights[name])
        model.tie_weights()
        grow_vocabulary(model, len(tokenizer))
        grown = model.state_dict()
        weights.replaced = {name: grown[name] for name in tables}
        generation_config, model = model.generation_config, empty_model(model.config)
        model.generation_config = generation_config
    match_vocabulary(model, tokenizer, args.tokenizer_name_or_path or args.model_name_or_path)
    return model, tokenizer, weights


def load_or_open(
    args: ModelArguments, streaming: bool | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Weights | None]:
    """
    The model of a surgery in memory, or opened: then it has no weights, and they come as the third value.

    Args:
        streaming: the recipe's key; `None` streams a checkpoint that is large for this machine's free memory.
    """
    if streaming is False:
        return *load_model_and_tokenizer(args), None
    folder = checkpoint_folder(args)
    if folder is None and streaming:
        raise UserError("streaming: true needs a checkpoint with safetensors in model_name_or_path, not a new model")
    if folder is None:
        return *load_model_and_tokenizer(args), None
    needed = GROWTH * sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    free = psutil.virtual_memory().available
    if not streaming and needed <= free:
        return *load_model_and_tokenizer(args), None
    why = "as the recipe says" if streaming else f"up to {needed / GB:.3g} GB in memory, {free / GB:.3g} GB are free"
    logger.info("streaming from disk to disk: %s", why)
    return open_checkpoint(args, folder)
