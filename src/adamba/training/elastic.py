"""
Elastic training: sampled widths in each micro-batch beside the full one, early exits, gates and router.

For a micro-batch with full-depth logits `z`, logits `z_w` at each sampled width, and `z_e` at a sampled exit:

    loss = CE(z) + sum over w of [b_w CE(z_w) + a KL(z || z_w) + c BCE(router, w is enough)]
           + b_e CE(z_e) + BCE(gate_e, argmax z_e = argmax z)

Gates and router see detached states only. See MatFormer (Devvrit et al., 2023) for the sampled sub-networks and
LayerSkip (Elhoushi et al., 2024) for exits through the shared head.
"""

import random
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from adamba.errors import UserError
from adamba.model import AdambaConfig, AdambaForCausalLM
from adamba.training.head_gradients import Weights
from adamba.training.head_losses import (
    IGNORED,
    HeadLosses,
    head_losses,
    next_token_losses,
    run_to_head,
    token_losses,
)


@dataclass
class ElasticArguments:
    elastic: bool = field(default=False, metadata={"help": "Train sampled widths, exits, gates and the router."})
    width_weights: dict[str, float] | None = field(
        default=None,
        metadata={"help": "Level name -> weight of being sampled. Default: each one step heavier than the last."},
    )
    width_loss_weights: dict[str, float] | None = field(
        default=None,
        metadata={"help": "Level name -> weight of its loss when it is sampled below the full width. Default: 1."},
    )
    num_sampled_widths: int = field(
        default=1, metadata={"help": "Widths below the full one trained in each micro-batch; each costs a pass."}
    )
    distill: bool = field(
        default=True, metadata={"help": "Run the full width too in each micro-batch and let the sampled one match it."}
    )
    distill_weight: float = field(default=0.5, metadata={"help": "Weight of KL(full || sampled width)."})
    exit_loss_weight: float = field(default=0.3, metadata={"help": "Weight of an exit's loss at the last layer."})
    num_sampled_exits: int = field(default=1, metadata={"help": "Exit layers trained in each micro-batch."})
    gate_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the exit gates' loss."})
    router_loss_weight: float = field(default=0.1, metadata={"help": "Weight of the width router's loss."})
    router_tolerance: float = field(
        default=0.05,
        metadata={"help": "A width is enough if its loss is above the full one's by at most this (nats)."},
    )

    def __post_init__(self) -> None:
        for key in ("width_weights", "width_loss_weights"):
            for name, weight in (getattr(self, key) or {}).items():
                if weight < 0:
                    raise UserError(f"{key}: {name}={weight} must not be negative")
        if self.num_sampled_widths < 1:
            raise UserError(f"num_sampled_widths: {self.num_sampled_widths} must be 1 or more")
        if self.num_sampled_widths > 1 and not self.distill:
            raise UserError(
                f"num_sampled_widths: {self.num_sampled_widths} needs distill: true; without it one width runs"
            )


@dataclass
class Draw:
    """What one micro-batch trains: `{level: width}` below the full one, exit layers, and the level that they are of
    (`None`: the full width's)."""

    widths: dict[int, int]
    exit_layers: list[int]
    exit_level: int | None


def by_level(config: AdambaConfig, key: str, named: dict[str, float] | None, otherwise: float) -> list[float]:
    """A recipe's weights of named levels, in the order of the model's levels.

    Raises:
        UserError: a name that is no level.
    """
    unknown = set(named or {}) - set(config.width_levels)
    if unknown:
        raise UserError(
            f"{key}: {sorted(unknown)[0]!r} is no level of the model; use {', '.join(config.width_levels)}"
        )
    return [(named or {}).get(name, otherwise) for name in config.width_levels]


def check_elastic(model: PreTrainedModel, args: ElasticArguments, recipe: str | None) -> None:
    """
    Before data is read: nothing else would say until the first step what this model cannot train.

    Raises:
        UserError: naming the recipe. A model without widths, or with one left; weights of what is no level.
    """
    if not args.elastic:
        return
    try:
        if not isinstance(model, AdambaForCausalLM):
            name = model.config._name_or_path or "the new model"
            raise UserError(f"elastic: needs a hybrid, but {name} is a {type(model).__name__}")
        draw(model.config, args, seed=0, step=0, micro_step=0)
        by_level(model.config, "width_loss_weights", args.width_loss_weights, otherwise=1.0)
    except UserError as error:
        raise UserError(f"{recipe or 'command line'}: {error}") from None


def draw(config: AdambaConfig, args: ElasticArguments, seed: int, step: int, micro_step: int) -> Draw:
    """The same on every rank and after every restart: it depends on nothing but the arguments."""
    if any(width != config.hidden_size for width in config.attention_widths):
        raise UserError("elastic: this checkpoint was sliced; train the elastic one that it came from")
    choose = random.Random(f"{seed}/{step}/{micro_step}")
    names = list(config.width_levels)
    weights = [float(rank + 1) for rank in range(len(names))]
    if args.width_weights is not None:
        weights = by_level(config, "width_weights", args.width_weights, otherwise=0.0)
    full_level = len(names) - 1
    if args.distill:
        weights[-1] = 0.0  # the full width runs anyway
    levels: list[int] = []
    for _ in range(args.num_sampled_widths):
        if any(weights):
            levels += choose.choices(range(len(names)), weights)
            weights[levels[-1]] = 0.0
    levels = [level for level in levels if level != full_level]
    gate_layers = config.gate_layers
    depth_weights = [float(layer + 1) for layer in gate_layers]
    exits: set[int] = set()
    while gate_layers and len(exits) < min(args.num_sampled_exits, len(gate_layers)):
        exits.add(choose.choices(gate_layers, depth_weights)[0])
    at_width = bool(levels) and (choose.random() < 0.5 or not args.distill)
    return Draw(
        widths={level: config.width_levels[names[level]] for level in levels},
        exit_layers=sorted(exits),
        exit_level=levels[0] if at_width else None,
    )


class Tally:
    """Sums and counts of what is logged, by key, until the next log; they stay where they are, so nobody waits."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, key: str, values: torch.Tensor, count: torch.Tensor | float) -> None:
        """`count` is of all the values, or of each."""
        values = values.detach().cpu() if values.device.type == "mps" else values.detach()  # MPS has no fp64
        count = torch.as_tensor(count, dtype=torch.float64, device=values.device).sum()
        entry = torch.stack((values.double().sum(), count))
        self.sums[key] = self.sums[key] + entry if key in self.sums else entry

    def means(self, of_all_ranks: bool = False) -> dict[str, float]:
        """`of_all_ranks`: all call it together; each may have keys of its own."""
        own = {key: entry.tolist() for key, entry in self.sums.items()}
        self.sums.clear()
        sums: dict[str, tuple[float, float]] = {}
        for part in gather_object([own]) if of_all_ranks else [own]:
            for key, (total, count) in part.items():
                before = sums.get(key, (0.0, 0.0))
                sums[key] = (before[0] + total, before[1] + count)
        return {key: total / count for key, (total, count) in sums.items() if count > 0}


def by_source(tally: Tally, losses: torch.Tensor, counted: torch.Tensor, sources: list[str] | None) -> None:
    """Add the loss of each row to its source's mean."""
    for row, source in enumerate(sources or []):
        tally.add(f"loss_{source}", losses[row], counted[row].sum())


def elastic_loss(
    model: torch.nn.Module,
    plain: AdambaForCausalLM,
    inputs: dict[str, torch.Tensor],
    args: ElasticArguments,
    chosen: Draw,
    num_items: torch.Tensor | float,
    tally: Tally,
    sources: list[str] | None = None,
) -> torch.Tensor:
    """
    The loss of one micro-batch.

    Args:
        model: what is called (it may be wrapped for data parallelism); `plain` is the model inside.
        inputs: `input_ids`, `labels` and what else the forward takes.
        num_items: predicted tokens in the whole batch; sums are divided by it.
    """
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    counted = labels[:, 1:] != IGNORED
    level_weights = by_level(plain.config, "width_loss_weights", args.width_loss_weights, otherwise=1.0)
    loss = torch.zeros((), device=labels.device)
    full = observed = None
    if args.distill or not chosen.widths:
        exits = chosen.exit_layers if chosen.exit_level is None else []
        full, output = run_to_head(model, plain, inputs, labels, exits, output_gates=True)
        observed = (full, output)
        loss = loss + full.total / num_items
        tally.add("loss_full", full.losses, counted.sum())
        by_source(tally, full.losses, counted, sources)
    for level, width in chosen.widths.items():
        exits = chosen.exit_layers if chosen.exit_level == level else []
        weights = Weights(level_weights[level], args.distill_weight)
        narrow, output = run_to_head(
            model, plain, inputs, labels, exits, full, weights, width=width, output_gates=True
        )
        loss = loss + narrow.total / num_items
        tally.add(f"loss_width_{width}", narrow.losses, counted.sum())
        if chosen.exit_level == level:
            observed = (narrow, output)
        if full is None:
            by_source(tally, narrow.losses, counted, sources)
            continue
        router_part = router_loss(
            plain, inputs, labels, full.losses, narrow.losses, counted, level, args.router_tolerance
        )
        loss = loss + args.router_loss_weight * router_part / num_items
    if observed is not None and observed[1].gate_logits is not None:
        loss = loss + exit_loss(plain, *observed, labels, chosen.exit_layers, args, num_items, tally)
    return loss


def exit_loss(
    plain: AdambaForCausalLM,
    final: HeadLosses,
    output,
    labels: torch.Tensor,
    exit_layers: list[int],
    args: ElasticArguments,
    num_items: torch.Tensor | float,
    tally: Tally,
) -> torch.Tensor:
    """
    Cross entropy of the sampled exits, heavier the deeper, and their gates' agreement with the full depth, `final`.
    `output` holds the hidden states of these layers and of the last, if this pass has exits.
    """
    counted = labels[:, 1:] != IGNORED
    # Gates that are not sampled take part with weight 0, so that every rank has a gradient for every weight.
    loss = output.gate_logits.sum() * 0.0
    for layer, hidden in zip(exit_layers, output.exit_hidden_states[:-1], strict=True):
        early = head_losses(plain, hidden, labels)
        depth = (layer + 1) / plain.config.num_hidden_layers
        loss = loss + args.exit_loss_weight * depth * early.total / num_items
        agrees = (early.choices == final.choices).float()
        gate = output.gate_logits[:, :-1, plain.config.gate_layers.index(layer)]
        errors = F.binary_cross_entropy_with_logits(gate.float(), agrees, reduction="none") * counted
        loss = loss + args.gate_loss_weight * errors.sum() / num_items
        tally.add("exit_loss", early.losses, counted.sum())
        tally.add("gate_loss", errors, counted.sum())
        tally.add(f"agreement_layer_{layer}", agrees * counted, counted.sum())
    return loss


def router_loss(
    plain: AdambaForCausalLM,
    inputs: dict[str, torch.Tensor],
    labels: torch.Tensor,
    full_losses: torch.Tensor,
    narrow_losses: torch.Tensor,
    counted: torch.Tensor,
    level: int,
    tolerance: float,
) -> torch.Tensor:
    """
    Was the sampled level wide enough for what followed the prompt? The prompt is what stands before the first label of
    a row, or its first quarter where everything is predicted. A sum, each row as heavy as the tokens that followed, so
    that micro-batches add up to the batch.
    """
    length = labels.shape[1]
    first_label = (labels[:, 1:] != IGNORED).float().argmax(-1) + 1
    prompt_length = torch.where(first_label > 1, first_label, length // 4)
    places = torch.arange(length, device=labels.device)
    prompt = places < prompt_length[:, None]
    if inputs.get("attention_mask") is not None:
        prompt = prompt & inputs["attention_mask"].bool()
    answer = counted & ~prompt[:, 1:]
    excess = ((narrow_losses - full_losses).detach() * answer).sum(1) / answer.sum(1).clamp(min=1)
    enough = (excess <= tolerance).float()
    logits = plain.model.router(plain.model.embed_tokens(inputs["input_ids"]), prompt)[..., level]
    errors = F.binary_cross_entropy_with_logits(logits, enough[:, None].expand_as(logits), reduction="none")
    return (errors.mean(1) * answer.sum(1)).sum()


class ElasticLossMixin:
    """
    Put before a `Trainer` class: the elastic loss where the recipe asks for it, and the loss of each source apart.
    """

    elastic_args: ElasticArguments = ElasticArguments()
    _tally: Tally | None = None
    _held_out: Tally = Tally()  # of the evaluation that runs
    _draw_place: tuple[int, int] = (-1, -1)

    @property
    def tally(self) -> Tally:
        if self._tally is None:
            self._tally = Tally()
        return self._tally

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        sources = self._source_names(inputs.pop("source_id", None))
        plain: PreTrainedModel = self.accelerator.unwrap_model(model)
        if hasattr(plain, "get_base_model"):  # LoRA
            plain = plain.get_base_model()
        labels = inputs["labels"]
        counted = labels[:, 1:] != IGNORED
        num_items = counted.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        num_items = num_items.clamp(min=1)  # a batch without any label has a loss of 0, not of 0 / 0
        logits = None
        if self.elastic_args.elastic and model.training:
            chosen = draw(plain.config, self.elastic_args, self.args.seed, *self._place())
            with self.accelerator.autocast():  # the head runs outside of the model's own forward
                loss = elastic_loss(model, plain, inputs, self.elastic_args, chosen, num_items, self.tally, sources)
        else:
            batch = {key: value for key, value in inputs.items() if key != "labels"}
            if return_outputs:
                logits = model(**batch, use_cache=False).logits
                losses = token_losses(logits, labels)
                total = losses.sum()
            else:
                with self.accelerator.autocast():
                    total, losses = next_token_losses(model, plain, batch, labels)
            loss = total / num_items
            if model.training:
                by_source(self.tally, losses, counted, sources)
            else:  # gathered as the Trainer gathers: rows that are there twice, to fill the last batch, go
                self._held_out.add("loss", *self.accelerator.gather_for_metrics((losses.sum(1), counted.sum(1))))
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """The Trainer's, with the loss of the mean token; its own mean of batch means depends on the batch size."""
        self._held_out = Tally()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        for loss in self._held_out.means().values():
            output.metrics[f"{metric_key_prefix}_loss"] = loss
        return output

    def _place(self) -> tuple[int, int]:
        """(optimizer step, micro-batch within it)."""
        step, micro_step = self._draw_place
        self._draw_place = (step, micro_step + 1) if step == self.state.global_step else (self.state.global_step, 0)
        return self._draw_place

    def _source_names(self, source_ids: torch.Tensor | None) -> list[str] | None:
        if source_ids is None:
            return None
        return [self.source_names[index] for index in source_ids.tolist()]

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            logs = {**logs, **self.tally.means(of_all_ranks=True)}
        super().log(logs, *args, **kwargs)
