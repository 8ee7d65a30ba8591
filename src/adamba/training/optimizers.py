"""Muon for matrices with AdamW for the rest, and old weights that move more slowly after an expansion."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from adamba.errors import UserError
from adamba.model import AdambaConfig
from adamba.surgery.axes import layer_of, role_of, shared_index
from adamba.surgery.expand import config_before_expansion
from adamba.training.sharding import is_sharded

# Matrices that Muon must not orthogonalise: look-up tables and the output head (Jordan et al., 2024).
NOT_MUON = ("embed_tokens", "lm_head", "conv1d", "exit_gates", "router")


def orthogonalise(matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float):
    """
    The nearest semi-orthogonal matrix, roughly: Newton-Schulz iteration (Jordan et al., 2024) in the matrix's own
    precision, with the rounding of `torch.optim.Muon` as the only difference.
    """
    a, b, c = coefficients
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Muon):
    """
    `torch.optim.Muon` with its learning rate scaled to the size of AdamW's updates. torch orthogonalises in bf16; on a
    CPU without bf16 instructions that takes as long as the rest of a small model's step, so a CPU does it in fp32.
    """

    def __init__(self, parameters, **options):
        super().__init__(parameters, adjust_lr_fn="match_rms_adamw", **options)

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        if self.param_groups[0]["params"][0].device.type != "cpu":
            return super().step(closure)
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            parameters: list[torch.Tensor] = []
            gradients: list[torch.Tensor] = []
            momenta: list[torch.Tensor] = []
            self._init_group(group, parameters, gradients, momenta)
            rate, momentum = group["lr"], group["momentum"]
            for parameter, gradient, buffer in zip(parameters, gradients, momenta, strict=True):
                buffer.lerp_(gradient, 1 - momentum)
                update = gradient.lerp(buffer, momentum) if group["nesterov"] else buffer
                update = orthogonalise(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.add_(update, alpha=-rate * 0.2 * max(parameter.shape) ** 0.5)  # AdamW's root mean square
        return loss


class MuonWithAdamW(torch.optim.Optimizer):
    """
    One optimizer over two: `Muon` for hidden matrices, AdamW for embeddings, head, norms, biases and the
    small parameters of Mamba. Both take the same learning rate (Muon's update is scaled to AdamW's size).
    """

    def __init__(self, named_parameters, lr: float, weight_decay: float, betas: tuple[float, float], eps: float):
        named = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
        is_matrix = {name: p.ndim == 2 and not any(part in name for part in NOT_MUON) for name, p in named}
        matrices = [p for name, p in named if is_matrix[name]]
        decayed = [p for name, p in named if not is_matrix[name] and p.ndim >= 2]
        others = [p for name, p in named if not is_matrix[name] and p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(Muon(matrices, lr=lr, weight_decay=weight_decay))
        if groups:
            self.parts.append(torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps))
        super().__init__([parameter for _, parameter in named], {"lr": lr})
        # The parts' own groups, so that a scheduler that writes here is heard there.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable | None = None):
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts], "state": {}, "param_groups": []}

    def load_state_dict(self, state_dict: dict) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def old_block(name: str, parameter: torch.Tensor, config: AdambaConfig) -> tuple[slice | torch.Tensor, ...] | None:
    """
    Where the entries of a parameter are that were there before the last expansion; `None` if all were. Slices wherever
    a dimension's are neighbours: indices of all entries of a large model are eight times its size, in each step anew.
    """
    narrow = config_before_expansion(config)
    role = role_of(name)
    if narrow is None or role.axes == ("fixed",):
        return None
    index = [
        torch.arange(size) if axis == "fixed" else shared_index(axis, narrow, config, layer_of(name))
        for axis, size in zip(role.axes, parameter.shape, strict=True)
    ]
    if [len(part) for part in index] == list(parameter.shape):
        return None
    block = [
        part.to(parameter.device) if int(part[-1] - part[0]) >= len(part) else slice(int(part[0]), int(part[-1]) + 1)
        for part in index
    ]
    assert sum(isinstance(part, torch.Tensor) for part in block) <= 1, name  # two would be taken in pairs
    return tuple(block)


def slow_old_weights(optimizer: torch.optim.Optimizer, model: nn.Module, scale: float) -> None:
    """
    After each optimizer step, take back `1 - scale` of what the old entries moved: their own learning rate, whatever
    the optimizer. Entries of a tensor cannot have a rate of their own in AdamW or Muon, and scaling their gradient
    would change nothing there. Parameters that an expansion left whole count as old.
    """
    blocks = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "exit_gates" not in name and "router" not in name:
            blocks.append((parameter, old_block(name, parameter, model.config) or ...))
    before: list[torch.Tensor] = []

    @torch.no_grad()
    def remember(*_) -> None:
        before[:] = [parameter[block].clone() for parameter, block in blocks]

    @torch.no_grad()
    def take_back(*_) -> None:
        for (parameter, block), old in zip(blocks, before, strict=True):
            parameter[block] = torch.lerp(old, parameter[block].contiguous(), scale)
        before.clear()

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(take_back)


@dataclass
class OptimizerKeys:
    """Put before a class of `TrainingArguments`; `OptimizerMixin` reads them."""

    use_muon: bool = field(default=False, metadata={"help": "Muon for hidden matrices, AdamW for the rest."})


class OptimizerMixin:
    """Put before a `Trainer` class: the recipe's `use_muon` and, where there is one, its `old_weight_lr_scale`."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """
        Those of the Trainer, without what is one number a head or gate: weight decay would pull Mamba's `A_log` and
        `D` to 0, so that all heads forgot alike, whatever they learn (mamba_ssm spares both too).
        """
        # ZeRO-3 has emptied the parameters; `ds_shape` is what they were.
        vectors = {name for name, p in model.named_parameters() if len(getattr(p, "ds_shape", p.shape)) < 2}
        return [name for name in super().get_decay_parameter_names(model) if name not in vectors]

    def create_optimizer(self, *args, **kwargs):
        if self.args.use_muon and is_sharded(self):
            raise UserError("use_muon: needs whole matrices on each rank (DDP), not ZeRO or FSDP")
        if self.optimizer is None and self.args.use_muon:
            self.optimizer = MuonWithAdamW(
                self.model.named_parameters(),
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
            )
        optimizer = super().create_optimizer(*args, **kwargs)
        scale = getattr(self.args, "old_weight_lr_scale", 1.0)
        if scale < 1:
            if is_sharded(self):
                raise UserError(
                    "old_weight_lr_scale: below 1 needs whole parameters on each rank (DDP), not ZeRO or FSDP"
                )
            slow_old_weights(self.optimizer, self.model, scale)
        return optimizer
