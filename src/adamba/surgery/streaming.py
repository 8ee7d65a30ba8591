"""
Surgery from disk to disk: weights are read, changed and written tensor by tensor, so that a model far larger than
memory passes. The rules are those of `rules.Surgery`; the result has the same bits as in memory.

A streamed model has no weights of its own: accelerate's hooks fetch each module's from a mapping when it runs, and
`save_pretrained` fetches them shard by shard. Verification therefore runs the model's own forward, a layer at a time.
"""

import copy
import ctypes
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from accelerate.hooks import attach_align_device_hook, remove_hook_from_submodules
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .rules import Surgery, carry_generation_config, empty_model

SHARD_SIZE = "1GB"  # what a writer holds beside the tensor at work
M_MMAP_THRESHOLD = -3  # malloc.h
# Modules that read their children's weights without calling them: they are fetched as a whole.
WHOLE_MODULES = ["Mamba2Mixer"]


def return_freed_memory() -> None:
    """
    Let glibc give freed tensors back to the system. By itself it keeps blocks of up to 32 MB for later, and a model of
    64 layers leaves gigabytes of holes between them. Elsewhere nothing happens.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**20)


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
        self.files: dict[str, str] = names

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self.replaced:
            return self.replaced[name].to(self.through).to(self.dtype)
        # Opened anew for each tensor: pages of a mapped file count as this process's memory until it is closed.
        with safe_open(self.folder / self.files[self._stored(name)], framework="pt") as file:
            return file.get_tensor(self._stored(name)).to(self.through).to(self.dtype)

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
        for problem, names in (
            ("missing", [name for name in shapes if name not in self]),
            ("unexpected", [name for name in self if name not in shapes]),
        ):
            if names:
                raise ValueError(f"{self.folder}: {len(names)} {problem} weights, first {sorted(names)[0]}")
        for shard in sorted(set(self.files.values())):
            try:
                with safe_open(self.folder / shard, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 (not a mapping)
                        found = tuple(file.get_slice(name).get_shape())
                        if name not in self.replaced and found != shapes[name]:
                            raise ValueError(f"{self.folder / shard}: {name} is {found}, not {shapes[name]}")
            except SafetensorError as error:
                raise ValueError(f"{self.folder / shard}: {error}; truncated or overwritten") from None


class Operated(Mapping[str, torch.Tensor]):
    """The tensors of the model after a surgery, made from the old ones when they are asked for."""

    def __init__(self, surgery: Surgery, old: Weights, shapes: Mapping[str, torch.Size], progress: Callable):
        self.surgery, self.old, self.shapes, self.progress = surgery, old, shapes, progress

    @torch.no_grad()
    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.surgery.tensor(name, self.shapes[name], self.old).to(self.old.dtype)
        self.progress(tensor.nbytes)
        return tensor.contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def attach(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """Let an `empty_model` fetch its weights from `weights`, each module's while it runs."""
    return_freed_memory()
    attach_align_device_hook(
        model,
        execution_device=torch.device("cpu"),
        offload=True,
        weights_map=weights,
        offload_buffers=True,
        preload_module_classes=WHOLE_MODULES,
    )
    model.hf_device_map = {"": "disk"}  # `save_pretrained` asks here whether to fetch
    return model.eval()


def empty_from_folder(folder: Path) -> PreTrainedModel:
    """The model of a checkpoint folder without its weights, generation config included."""
    model = empty_model(AutoConfig.from_pretrained(folder))
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def num_weight_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Size of a model's checkpoint; a tied head is stored once."""
    names = {name for name, _ in model.named_parameters()}  # shared parameters are listed once
    names |= {name for name, _ in model.named_buffers() if name in model.state_dict()}
    return sum(t.numel() for name, t in model.state_dict().items() if name in names) * dtype.itemsize


def stream(surgery: Surgery, before: PreTrainedModel, old: Weights, folder: Path) -> PreTrainedModel:
    """
    Write the model after the surgery into `folder`, as `save_pretrained` does, in shards of 1 GB.

    Args:
        before: the old model without weights, for its generation config.

    Returns:
        The new model, without weights.
    """
    after = empty_model(copy.deepcopy(surgery.config)).to(old.dtype)
    carry_generation_config(before, after)
    shapes = {name: tensor.shape for name, tensor in after.state_dict().items()}
    size = num_weight_bytes(after, old.dtype)
    with tqdm(total=size, unit="B", unit_scale=True, desc="surgery", mininterval=1) as bar:
        attach(after, Operated(surgery, old, shapes, bar.update))
        if after.config.tie_word_embeddings:
            after.lm_head.weight = after.model.embed_tokens.weight  # the hooks parted them
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
            after.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # written, not only handed to the system: a power cut must not undo an hour
    remove_hook_from_submodules(after)
    return after
