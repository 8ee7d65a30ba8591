"""Recipes: one flat YAML file gives every setting of a run, the command line overrides any of them.

    args, training_args, recipe = parse(PretrainArguments, TrainingArguments)

    python src/run_pretrain.py recipes/tiny/phase1.yaml --max_steps 10 --mix calculator=1.0,tic_tac_toe=0.5

A value is the dataclass default, unless the recipe has the key, unless the command line has it. Values are checked
against the field's annotation wherever they come from, so a typo or a wrong type stops the run before it starts.
"""

import argparse
import dataclasses
import difflib
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl import TrlParser

from adamba.errors import UserError, one_line
from adamba.fingerprint import fingerprint_code
from adamba.kept_help import KeepingParser
from adamba.launch import check_launch, check_precision
from adamba.recipe_file import Recipe, read_recipe
from adamba.recipe_ranges import out_of_range
from adamba.recipe_values import contains, describe, fit, fit_text
from adamba.secrets_kept import is_secret_name

_UNSET = object()

# What a recipe's `env` may set: how libraries compute and talk, never programs, plugins, addresses or secrets.
ENVIRONMENT_NAMES = re.compile(
    r"ADAMBA_[A-Z_]+|(OMP|MKL)_NUM_THREADS|NCCL_(DEBUG|P2P_DISABLE|IB_DISABLE|SOCKET_IFNAME|IB_HCA|ALGO|PROTO)"
    r"|CUDA_(VISIBLE_DEVICES|LAUNCH_BLOCKING|DEVICE_MAX_CONNECTIONS)|PYTORCH_(CUDA_)?ALLOC_CONF"
    r"|TOKENIZERS_PARALLELISM|(HF_HUB|HF_DATASETS|TRANSFORMERS)_OFFLINE|HF_HUB_(DISABLE_XET|DOWNLOAD_TIMEOUT)"
    r"|WANDB_(PROJECT|MODE)|TRACKIO_(PROJECT|DIR)"
)

# Keys of older versions of the stack and common abbreviations that no spelling distance would find.
RENAMED_KEYS = {
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "gradient_clipping": "max_grad_norm",
    "hub_private_repo": "hub_private",
    "max_prompt_length": "max_length",
    "max_seq_length": "max_length",
    "model": "model_name_or_path",
    "steps": "max_steps",
    "torch_dtype": "dtype",
    "warmup_ratio": "warmup_steps",  # a value below 1 is a share of all steps
}


def parse(*dataclass_types: type, argv: Sequence[str] | None = None, script: str | None = None) -> tuple[Any, ...]:
    """Parse `[recipe.yaml] [--key value ...]` into one instance per dataclass, followed by the `Recipe`.

    Raises:
        UserError: for a missing or malformed file, an unknown key, a value of the wrong type, a required key that is
            absent, or a value the dataclass itself refuses; for a launch that does not fit this machine.
    """
    parser = AdambaParser(dataclass_types)
    return parser.parse_recipe(sys.argv[1:] if argv is None else list(argv), script or sys.argv[0])


class AdambaParser(TrlParser, KeepingParser):
    """`TrlParser` with the recipe as first argument, no abbreviations and every value checked.

    Errors are `UserError`s of one line; nothing is written to stderr and nothing exits here, except `--help`.
    """

    def __init__(self, dataclass_types: Iterable[type], **kwargs: Any) -> None:
        self.hints: dict[str, Any] = {}
        dataclass_types = list(dataclass_types)
        for dataclass_type in dataclass_types:
            hints = get_type_hints(dataclass_type)
            self.hints |= {field.name: hints[field.name] for field in dataclasses.fields(dataclass_type) if field.init}
        kwargs.setdefault("usage", "%(prog)s [recipe.yaml] [--key value ...]")
        super().__init__(dataclass_types=dataclass_types, allow_abbrev=False, **kwargs)  # type: ignore[call-arg]  # TRL's
        self.required = [action.dest for action in self._actions if action.required]
        for action in self._actions:
            action.required = False  # a recipe may give it; checked once both are read

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
        """Add one field. Lists, mappings and unions that argparse cannot hold are read by `fit_text`."""
        hint: Any = field.type
        if not contains(hint, (list, tuple, dict)):
            return TrlParser._parse_dataclass_field(parser, field)
        default: Any = None
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        parser.add_argument(
            *dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"]),
            nargs="+" if contains(hint, (list, tuple)) else None,
            default=default,
            required=field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING,
            help=field.metadata.get("help"),
        )
        return None

    def error(self, message: str) -> Any:
        raise UserError(f"command line: {message}")

    def parse_recipe(self, argv: list[str], script: str) -> tuple[Any, ...]:
        path, argv = _split_recipe_path(argv)
        in_file = self._checked_file(path) if path else {}
        on_command_line = self._checked_command_line(argv)
        values = in_file | on_command_line
        check_launch(use_cpu=bool(values.get("use_cpu")))
        if values.get("use_cpu"):
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed takes a GPU, or warns of none, on its own
        source = path or "command line"
        missing = [key for key in self.required if key not in values]
        if missing:
            recipe = "" if path else ", or give a recipe first, which has all keys"
            needs = describe(self.hints[missing[0]])
            raise UserError(f"{source}: key '{missing[0]}': required, give it a {needs}{recipe}")

        instances = []
        resolved = dict(values)
        for dataclass_type in self.dataclass_types:
            fields = [field.name for field in dataclasses.fields(dataclass_type) if field.init]
            try:
                instance = dataclass_type(**{key: values[key] for key in fields if key in values})
            except ValueError as error:
                said = one_line(error)
                blamed = re.match(r"(?:--)?(\w+)", said)
                given_there = blamed is not None and blamed[1] in on_command_line
                if path is None and ": missing" in said:
                    said += "; or give a recipe first, which has all keys, for instance recipes/tiny/phase1.yaml"
                raise UserError(f"{'command line' if given_there else source}: {said}") from error
            instances.append(instance)
            if hasattr(instance, "bf16"):
                check_precision(instance.bf16, instance.fp16)
            if dataclass_type.__module__.partition(".")[0] not in ("trl", "transformers", "peft"):
                own = {name for base in _own_bases(dataclass_type) for name in base.__annotations__}
                resolved |= {k: _default_of(dataclass_type, k) for k in fields if k in own and k not in values}
        given = (key for key in sorted(on_command_line) if key != "model_name_or_path" and not is_secret_name(key))
        asked = " ".join([path or Path(script).name, *(f"--{key} {on_command_line[key]}" for key in given)])
        return (*instances, Recipe(path, script, fingerprint_code(script), values, resolved, asked))

    def _checked_file(self, path: str) -> dict[str, Any]:
        values = read_recipe(path)
        environment = values.pop("env", {})
        if not isinstance(environment, dict):
            raise UserError(f"{path}: key 'env': got {environment!r}, needs a mapping of environment variables")
        for name in environment:
            if not ENVIRONMENT_NAMES.fullmatch(str(name)):
                raise UserError(
                    f"{path}: key 'env': {name} may not be set by a recipe, which cannot choose what code runs or "
                    f"where it connects; set it in the shell"
                )
        unknown = [key for key in values if key not in self.hints]
        if unknown:
            raise UserError(f"{path}: " + "; ".join(self._unknown(key, values[key]) for key in unknown))
        checked = {key: self._fit(path, key, value) for key, value in values.items()}
        os.environ.update({key: str(value) for key, value in environment.items()})
        return checked

    def _checked_command_line(self, argv: list[str]) -> dict[str, Any]:
        blank = argparse.Namespace(**{action.dest: _UNSET for action in self._actions if action.dest != "help"})
        namespace, remaining = self.parse_known_args(argv, blank)
        for text, following in zip(remaining, [*remaining, ""][1:], strict=True):
            if text.startswith("-"):
                key, _, value = text.lstrip("-").partition("=")
                value = value or (following if not following.startswith("--") else "")
                raise UserError(f"command line: {self._unknown(key.replace('-', '_'), value)}")
            raise UserError(f"command line: unexpected argument '{text}'; the recipe comes first, then --key value")
        given = {key: value for key, value in vars(namespace).items() if value is not _UNSET}
        checked = {}
        for key, value in given.items():
            hint = self.hints[key]
            if contains(hint, (list, tuple, dict)):
                try:
                    value = fit_text(value if isinstance(value, list) else [value], hint)
                except ValueError as error:
                    raise UserError(f"command line: key '{key}': {error}") from None
            checked[key] = self._fit("command line", key, value)
        return checked

    def _fit(self, source: str, key: str, value: Any) -> Any:
        try:
            value = fit(value, self.hints[key])
        except ValueError as error:
            raise UserError(f"{source}: key '{key}': {error}") from None
        if wrong := out_of_range(key, value, self.dataclass_types):
            raise UserError(f"{source}: {wrong}")
        if key == "report_to":
            _check_trackers(source, [value] if isinstance(value, str) else value or [])
        return value

    def _unknown(self, key: str, value: Any) -> str:
        if is_secret_name(key):
            where = "no place in a recipe or on a command line; set HF_TOKEN or run `hf auth login`"
            return f"key '{key}': a secret has {where}"
        given = f" (given {value!r})" if value != "" else ""
        return f"key '{key}': unknown{given}{self._hint(key)}"

    def _hint(self, key: str) -> str:
        """`; did you mean 'learning_rate'?` for the nearest known key, or nothing."""
        known = sorted(self.hints)
        initials = [name for name in known if "".join(word[:1] for word in name.split("_")) == key]
        candidates = [
            *([RENAMED_KEYS[key]] if RENAMED_KEYS.get(key) in known else []),
            *difflib.get_close_matches(key, known, n=1, cutoff=0.75),
            *(sorted(initials, key=lambda name: name != "learning_rate") if len(key) > 1 else []),
            *difflib.get_close_matches(key, known, n=1, cutoff=0.5),
        ]
        return f"; did you mean '{candidates[0]}'?" if candidates else ""


def _check_trackers(source: str, names: Iterable[str]) -> None:
    for name in names:
        if name not in ("none", "all", *INTEGRATION_TO_CALLBACK):
            raise UserError(
                f"{source}: report_to: {name!r} is unknown; use none, {', '.join(INTEGRATION_TO_CALLBACK)}"
            )
        if name in ("wandb", "trackio", "mlflow", "comet_ml", "swanlab") and importlib.util.find_spec(name) is None:
            raise UserError(f"{source}: report_to: {name} is not installed; pip install {name}, or use none")


def _split_recipe_path(argv: list[str]) -> tuple[str | None, list[str]]:
    """Take the recipe's path from the front, or from `--config path` / `--config=path`."""
    if argv and not argv[0].startswith("-"):
        return argv[0], argv[1:]
    for index, text in enumerate(argv):
        if text == "--config" and index + 1 < len(argv):
            return argv[index + 1], argv[:index] + argv[index + 2 :]
        if text.startswith("--config="):
            return text.removeprefix("--config="), argv[:index] + argv[index + 1 :]
    return None, argv


def _own_bases(dataclass_type: type) -> list[type]:
    """The dataclass and its bases that are defined in this project rather than in a library."""
    libraries = ("trl", "transformers", "peft", "builtins")
    return [
        base
        for base in dataclass_type.__mro__
        if base.__module__.partition(".")[0] not in libraries and "__annotations__" in vars(base)
    ]


def _default_of(dataclass_type: type, key: str) -> Any:
    field = {field.name: field for field in dataclasses.fields(dataclass_type)}[key]
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
