"""A model without weights of its own: each module's are fetched from a mapping when it runs, and dropped after it."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from .memory import return_freed_memory

T = TypeVar("T")
# Modules that read their children's weights without calling them: they are fetched as a whole.
WHOLE_MODULES = ("Mamba2Mixer",)


class Together:
    """
    Up to `calls` forward passes of one model at the same time, one a thread. They meet at every module, so that its
    weights are fetched once for all of them: at several widths a checkpoint is read once instead of once a width.
    """

    def __init__(self, calls: int = 1):
        self.calls = calls
        self.barrier: threading.Barrier | None = None  # while several run

    def run(self, functions: list[Callable[[], T]]) -> list[T]:
        """
        The result of each of `functions`.

        Raises:
            Exception: the first that one of them raised.
        """
        if len(functions) == 1:
            return [functions[0]()]
        self.barrier = threading.Barrier(len(functions))
        with ThreadPoolExecutor(len(functions)) as pool:
            futures = [pool.submit(self._guarded, function, self.barrier) for function in functions]
        self.barrier = None
        errors = [error for error in (future.exception() for future in futures) if error is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return [future.result() for future in futures]

    @staticmethod
    def _guarded(function: Callable[[], T], barrier: threading.Barrier) -> T:
        try:
            return function()
        except BaseException:
            barrier.abort()  # the others wait for this call
            raise

    def once(self, action: Callable[[], None]) -> None:
        """Run `action` in one of the calls when all are here, before any goes on."""
        if self.barrier is None:
            action()
            return
        if self.barrier.wait() == 0:
            action()
        self.barrier.wait()


def attach(model: PreTrainedModel, weights: Mapping[str, torch.Tensor], together: Together | None = None):
    """Let an `empty_model` fetch its weights from `weights`, each module's while it runs; returns the model."""
    return_freed_memory()
    stored = set(model.state_dict())
    _attach(model, "", weights, stored, together or Together())
    return model.eval()


def _attach(module: nn.Module, prefix: str, weights: Mapping, stored: set[str], together: Together) -> None:
    whole = type(module).__name__ in WHOLE_MODULES
    places: list[tuple[dict, str, str]] = []  # the dictionary that holds a weight, its key there, its full name
    for path, part in module.named_modules() if whole else [("", module)]:
        for holder in (part._parameters, part._buffers):
            for key in holder:
                name = ".".join(filter(None, (prefix, path, key)))
                if name in stored:
                    places.append((holder, key, name))
    if places:
        without = [holder[key] for holder, key, _ in places]

        def fetch() -> None:
            for holder, key, name in places:
                holder[key] = nn.Parameter(weights[name], requires_grad=False)

        def drop() -> None:
            for (holder, key, _), nothing in zip(places, without, strict=True):
                holder[key] = nothing

        module.register_forward_pre_hook(lambda *_: together.once(fetch))
        module.register_forward_hook(lambda *_: together.once(drop))
    if not whole:
        for name, child in module.named_children():
            _attach(child, f"{prefix}.{name}".removeprefix("."), weights, stored, together)
