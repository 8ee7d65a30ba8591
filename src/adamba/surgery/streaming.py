"""
Surgery from disk to disk: weights are read, changed and written tensor by tensor, so that a model far larger than
memory passes. The rules are those of `rules.Surgery`; the result has the same bits as in memory.
"""

import copy
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .memory import converted, return_freed_memory
from .rules import Surgery, carry_generation_config, empty_model
from .tensor_files import is_written, read_header, read_tensor, write_files

logger = logging.getLogger("adamba")

SHARD_SIZE = "1GB"


class Weights(Mapping[str, torch.Tensor]):
    """
    The tensors of a checkpoint folder by name, read when they are asked for and kept by nobody.

    Args:
        dtype: what tensors become.
        replaced: tensors that stand in for those of the folder.
        through: a type that they are rounded to on the way.

    Raises:
        ValueError: a folder without safetensors, or one that lacks a shard.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        replaced: Mapping[str, torch.Tensor] | None = None,
        through: torch.dtype | None = None,
    ):
        self.folder, self.dtype, self.through = folder, dtype, through or dtype
        self.replaced = dict(replaced or {})
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        if index.is_file():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        elif (folder / SAFE_WEIGHTS_NAME).is_file():
            try:
                with safe_open(folder / SAFE_WEIGHTS_NAME, framework="pt") as file:
                    names = dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)
            except SafetensorError as error:
                raise ValueError(f"{folder / SAFE_WEIGHTS_NAME}: {error}; truncated or overwritten") from None
        else:
            raise ValueError(f"{folder}: no safetensors in it; surgery reads nothing else")
        for shard in sorted(set(names.values())):
            if not (folder / shard).is_file():
                raise ValueError(f"{folder / shard}: missing; the checkpoint is incomplete")
        # Old checkpoints (Llama 2) hold each layer's rotary table; transformers drops them too.
        self.files: dict[str, str] = {name: names[name] for name in names if not name.endswith("rotary_emb.inv_freq")}
        self.headers: dict[Path, tuple[int, dict]] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self.replaced:
            return self.replaced[name].to(self.through).to(self.dtype)
        path = self.folder / self.files[self._stored(name)]
        if path not in self.headers:
            self.headers[path] = read_header(path)
        begin, header = self.headers[path]
        return read_tensor(path, begin, header[self._stored(name)], self.dtype, self.through)

    def as_dtype(self, dtype: torch.dtype) -> "Weights":
        """The same values in another type, as the verification computes with them."""
        return Weights(self.folder, dtype, self.replaced, through=self.dtype)

    def __contains__(self, name: object) -> bool:
        return str(name) in self.replaced or self._stored(str(name)) in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def _stored(self, name: str) -> str:
        """A tied head is in no file: it is the embedding."""
        tied = name == "lm_head.weight" and name not in self.files
        return "model.embed_tokens.weight" if tied else name

    def check(self, model: PreTrainedModel) -> None:
        """
        Compare names and shapes with a model's, from the files' headers alone.

        Raises:
            ValueError: naming the first tensor that is missing, unexpected, of another shape, or cut off.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        own = self.files.keys() | self.replaced.keys()
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        for problem, names in (
            ("missing", sorted(shapes.keys() - own - tied)),
            ("unexpected", [name for name in self if name not in shapes]),
        ):
            if names:
                raise ValueError(f"{self.folder}: {len(names)} {problem} weights, first {sorted(names)[0]}")
        for shard in sorted(set(self.files.values())):
            try:
                with safe_open(self.folder / shard, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 (not a mapping)
                        found = tuple(file.get_slice(name).get_shape())
                        if name in self.files and name not in self.replaced and found != shapes[name]:
                            raise ValueError(f"{self.folder / shard}: {name} is {found}, not {shapes[name]}")
            except SafetensorError as error:
                raise ValueError(f"{self.folder / shard}: {error}; truncated or overwritten") from None


class Operated(Mapping[str, torch.Tensor]):
    """The tensors of the model after a surgery, made from the old ones when they are asked for."""

    def __init__(self, surgery: Surgery, old: Weights, shapes: Mapping[str, torch.Size]):
        self.surgery, self.old, self.shapes = surgery, old, shapes

    @torch.no_grad()
    def __getitem__(self, name: str) -> torch.Tensor:
        return converted(self.surgery.tensor(name, self.shapes[name], self.old), self.old.dtype).contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def empty_from_folder(folder: Path) -> PreTrainedModel:
    """The model of a checkpoint folder without its weights, generation config included."""
    model = empty_model(AutoConfig.from_pretrained(folder))
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def stored_shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    """Name -> shape of what a model's checkpoint holds; a tied head is stored once."""
    names = {name for name, _ in model.named_parameters()}  # shared parameters are listed once
    names |= {name for name, _ in model.named_buffers()}
    return {name: tensor.shape for name, tensor in model.state_dict().items() if name in names}


def num_weight_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Size of a model's checkpoint without the headers of its files."""
    return sum(shape.numel() for shape in stored_shapes(model).values()) * dtype.itemsize


def save(
    model: PreTrainedModel, weights: Mapping[str, torch.Tensor], folder: Path, weights_folder: Path | None = None
) -> None:
    """
    What `save_pretrained` writes into a folder, to the byte, of an `empty_model` with these weights.

    Args:
        weights_folder: where their files go instead of `folder`; those that are there already are not written again.
    """
    return_freed_memory()
    model.save_pretrained(folder, state_dict={})  # all but the weights, which it deletes
    weights_folder = weights_folder or folder
    weights_folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    shapes = stored_shapes(model)
    pattern = SAFE_WEIGHTS_NAME.replace(".", "{suffix}.")
    split = split_torch_state_dict_into_shards(
        {name: state[name] for name in shapes}, filename_pattern=pattern, max_shard_size=SHARD_SIZE
    )
    files = {
        weights_folder / file: {name: shapes[name] for name in names}
        for file, names in split.filename_to_tensors.items()
    }
    missing = {path: names for path, names in files.items() if not is_written(path, names, model.dtype)}
    if len(missing) < len(files):
        logger.info("continuing: %d of %d files are there", len(files) - len(missing), len(files))
    size = sum(shape.numel() for names in missing.values() for shape in names.values()) * model.dtype.itemsize
    with tqdm(total=size, unit="B", unit_scale=True, desc="surgery", mininterval=1) as bar:
        write_files(missing, model.dtype, weights.__getitem__, bar.update)
    if split.is_sharded:
        index = {
            "metadata": {"total_parameters": model.num_parameters(), **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (weights_folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


def stream(
    surgery: Surgery, before: PreTrainedModel, old: Weights, folder: Path, weights_folder: Path | None = None
) -> PreTrainedModel:
    """
    Write the model after the surgery into `folder`, as `save_pretrained` does, in shards of 1 GB.

    Args:
        before: the old model without weights, for its generation config.
        weights_folder: see `save`.

    Returns:
        The new model, without weights.
    """
    after = empty_model(copy.deepcopy(surgery.config)).to(old.dtype)
    after.tie_weights()  # the new type parted them
    carry_generation_config(before, after)
    save(after, Operated(surgery, old, stored_shapes(after)), folder, weights_folder)
    return after
