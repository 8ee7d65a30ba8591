"""
`torch_compile: true`: what a training step repeats is compiled piece by piece, each kind of layer once per shape.

`torch.compile` of the whole model, which is what the Trainer would do, compiles every layer again for each width and
each draw of exits, for minutes. Here `AttentionLayer` and `MambaLayer` are compiled for themselves, a few seconds for
each width, and so is what the head's logits are reduced to. Only training passes run compiled: generation, whose
lengths change with every token, and evaluation run the layers as they are.
"""

import functools
import inspect
import logging

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from adamba.errors import UserError
from adamba.model import AdambaForCausalLM
from adamba.model.mamba_adamba import MambaLayer
from adamba.training.head_gradients import reduce_with_gradient
from adamba.training.head_losses import reduce_logits

logger = logging.getLogger("adamba")

SPECIALISED = 64  # times one function may be compiled: widths × rows with and without several documents × dtypes


def take_over_compilation(args: TrainingArguments) -> None:
    """
    Keep the recipe's `torch_compile` from the Trainer, for `compile_layers`.

    Raises:
        UserError: rows of changing length, for each of which all would be compiled again.
    """
    args.compile_with = None
    if not args.torch_compile:
        return
    if not (hasattr(args, "train_only") or getattr(args, "packing", False)):
        raise UserError(
            "torch_compile: needs rows of one length, so run_pretrain.py or run_sft.py with packing: true; each "
            "other length would be compiled anew"
        )
    args.compile_with = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
    args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None


def compile_layers(model: PreTrainedModel, args: TrainingArguments) -> None:
    """
    Compile the layers of a hybrid in place, or a dense base whole, where the recipe asks for it. Inductor is not asked
    on a CPU, where it needs a C++ compiler and gains nothing; and nothing is compiled under ZeRO-3, whose hooks inside
    a layer are other code each time (two tiny processes took 20 times as long).
    """
    options = getattr(args, "compile_with", None)
    if options is None:
        return
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    if args.device.type == "cpu" and options["backend"] == "inductor":
        logger.info("torch_compile: on a CPU the layers run as they are")
    elif is_deepspeed_zero3_enabled():
        logger.warning("torch_compile: under ZeRO-3 the layers run as they are; ZeRO-2 and FSDP2 run them compiled")
    elif isinstance(model, AdambaForCausalLM):
        compile_for_training(model, **options)
        logger.info("torch_compile: each layer is compiled when it first runs at a width, with %s", options["backend"])
    else:
        model.compile(**options)


def compile_for_training(model: AdambaForCausalLM, backend: str = "inductor", mode: str | None = None) -> None:
    """Give each layer a compiled forward for passes that have a gradient; compile what the head's logits become."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SPECIALISED)
    compile_one = functools.partial(torch.compile, backend=backend, mode=mode, dynamic=False)
    classes: dict[type[nn.Module], type[nn.Module]] = {}
    model.reduce_logits = torch.compile(reduce_logits, backend=backend, mode=mode)
    model.reduce_with_gradient = torch.compile(reduce_with_gradient, backend=backend, mode=mode)
    for layer in model.model.layers:
        if type(layer) not in classes:
            classes[type(layer)] = _compiled_class(type(layer), compile_one)
        layer.__class__ = classes[type(layer)]
        if isinstance(layer, MambaLayer):
            setattr(layer.mixer, "_mix", torch.compiler.disable(layer.mixer._mix))  # noqa: B010  kernels of its own


def _compiled_class(kind: type[nn.Module], compile_one) -> type[nn.Module]:
    """
    A subclass, so that activation checkpointing, which transformers puts around the `forward` of a class, stays
    outside of what is compiled.
    """
    plain = inspect.unwrap(kind.forward)
    compiled = compile_one(plain)

    @functools.wraps(plain)
    def forward(self, *args, **kwargs):
        return (compiled if self.training and torch.is_grad_enabled() else plain)(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
