"""
Training the width router by itself, and setting it to a compute budget; every other weight stays as it is.

For a prompt x with answer y and each width level below the widest, the router learns how much of the answer is left:

    quality(level) = min(1, P_level(y | x) / P_full(y | x))

It sees the prompt only. `WidthRouter.choose` then takes the narrowest level whose predicted quality reaches the
router's confidence, and the budget sets that confidence: the highest that held-out prompts can afford, written into
the generation config as `router_confidence`. So one trained router serves every budget.

All layers get the same level: a model whose layers were trained at one width together loses where they differ
(`bench/router.py` measures it). Shape legend: B rows, L tokens, N width levels.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from adamba.errors import UserError
from adamba.flops import forward_flops_per_token
from adamba.model import AdambaConfig, AdambaForCausalLM
from adamba.training.freezing import freeze_all_but
from adamba.training.head_losses import IGNORED, token_losses
from adamba.training.sft import MixSFTTrainer

# What the budget chooses from. Next to nothing of a long answer may be left at a narrow width; where that is so of all
# prompts, the budget still holds.
CONFIDENCES = [10.0**-power for power in range(30, 2, -1)] + [step / 100 for step in range(1, 100)]


@dataclass
class RouterArguments:
    train_router: bool = field(
        default=False, metadata={"help": "Train the width router alone; every other weight is frozen."}
    )
    router_budget: float = field(
        default=0.6,
        metadata={"help": "Share of the full width's FLOPs that the router may spend on the mean held-out prompt."},
    )

    def __post_init__(self) -> None:
        if not 0 < self.router_budget <= 1:
            raise UserError(f"router_budget: {self.router_budget} must be above 0, at most 1 (all of full width)")


def prepare_router_run(model, router_args: RouterArguments, args) -> None:
    """Freeze all but the router, and let it begin without a preference.

    Raises:
        UserError: there is nothing to route, the rows are not single conversations, or the budget is out of reach.
    """
    if not isinstance(model, AdambaForCausalLM) or len(model.config.width_levels) < 2:
        raise UserError("train_router: this model has no widths to choose from; phase 2 trains them")
    if args.packing or not args.assistant_only_loss:
        raise UserError("train_router: needs packing: false and assistant_only_loss: true, a prompt and its answer")
    if args.world_size > 1:
        raise UserError(f"train_router: runs in one process, not {args.world_size}; most of it needs no gradient")
    cheapest = level_costs(model.config, args.max_length)[0].item()
    if router_args.router_budget < cheapest:
        raise UserError(
            f"router_budget: {router_args.router_budget} is less than the narrowest width costs; use at least "
            f"{cheapest:.3f}"
        )
    freeze_all_but(model, "router")
    model.model.router.up_proj.reset_parameters()
    torch.nn.init.zeros_(model.model.router.down_proj.weight)
    torch.nn.init.zeros_(model.model.router.down_proj.bias)


def level_costs(config: AdambaConfig, context_length: int) -> torch.Tensor:
    """FLOPs of a token at each level, (N,); 1 is full width."""
    full = forward_flops_per_token(config, None, context_length)
    levels = config.width_levels.values()
    return torch.tensor([forward_flops_per_token(config, width, context_length) / full for width in levels])


def draw_turn(labels: torch.Tensor, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """One turn of the assistant in each row: the prompt before it and its tokens, both (B, L) masks."""
    counted = labels != IGNORED
    starts = counted & ~F.pad(counted[:, :-1], (1, 0))
    number = starts.cumsum(-1)  # of the turn, from 1 on
    chosen = [rng.randint(1, max(1, count)) for count in number[:, -1].tolist()]
    chosen_B1 = torch.tensor(chosen, device=labels.device)[:, None]
    return number < chosen_B1, counted & (number == chosen_B1)


@torch.no_grad()
def qualities(
    model: AdambaForCausalLM, inputs: dict, labels: torch.Tensor, answer: torch.Tensor, widths: list
) -> torch.Tensor:
    """min(1, P_width(answer) / P_full(answer)) of each row and width, (B, widths)."""

    def answer_loss(width) -> torch.Tensor:
        logits = model(**inputs, use_cache=False, width=width).logits
        return (token_losses(logits, labels) * answer[:, 1:]).sum(-1)

    full = answer_loss(None)
    losses = torch.stack([answer_loss(width) for width in widths], dim=-1)
    return (full[:, None] - losses).clamp(max=0).exp()


class RouterTrainer(MixSFTTrainer):
    """`MixSFTTrainer` whose training loss is the router's; evaluation is the model's own loss at full width."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        plain: AdambaForCausalLM = self.accelerator.unwrap_model(model)
        inputs = {key: value for key, value in inputs.items() if key != "source_id"}
        labels = inputs.pop("labels")
        prompt, answer = draw_turn(labels, random.Random("/".join(map(str, (self.args.seed, *self._place())))))
        *widths, _ = plain.config.width_levels.values()
        quality = qualities(plain, inputs, labels, answer, widths)
        logits = plain.model.router(plain.model.embed_tokens(inputs["input_ids"]), prompt)
        target = quality[:, None].expand_as(logits)
        loss = F.binary_cross_entropy_with_logits(logits.float(), target)
        for width, kept in zip(widths, quality.unbind(-1), strict=True):
            self.tally.add(f"quality_width_{width}", kept, len(kept))
        if num_items_in_batch is not None:  # then the Trainer takes the sum of the micro-batches
            loss = loss / self.current_gradient_accumulation_steps
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss


@dataclass
class Prompts:
    """Held-out turns of one source: what the router predicts of each level below the widest, and what is true."""

    predicted: torch.Tensor  # (turns, N - 1)
    quality: torch.Tensor  # (turns, N), the last being 1

    def at(self, confidence: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The level of each turn, and the quality there."""
        enough = F.pad((self.predicted >= confidence).int(), (0, 1), value=1)
        level = enough.argmax(-1)
        return level, self.quality.gather(1, level[:, None]).squeeze(1)


@torch.no_grad()
def observe_prompts(trainer: RouterTrainer) -> dict[str, Prompts]:
    """One turn of each held-out row, by source."""
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    *widths, _ = model.config.width_levels.values()
    rng = random.Random(0)
    observed = {}
    for source, dataset in trainer.eval_dataset.items():
        predicted, quality = [], []
        for batch in trainer.get_eval_dataloader(dataset):
            batch = {key: value.to(model.device) for key, value in batch.items() if key != "source_id"}
            labels = batch.pop("labels")
            prompt, answer = draw_turn(labels, rng)
            logits = model.model.router(model.model.embed_tokens(batch["input_ids"]), prompt)
            predicted.append(logits.mean(1).sigmoid().cpu())  # every layer learnt the same
            quality.append(F.pad(qualities(model, batch, labels, answer, widths), (0, 1), value=1.0).cpu())
        observed[source] = Prompts(torch.cat(predicted), torch.cat(quality))
    return observed


def set_budget(trainer: RouterTrainer, budget: float, mix: Mapping[str, float]) -> dict[str, float]:
    """
    Choose the highest confidence whose mean cost on held-out turns, weighted as the mix, is within the budget, and put
    it into the generation config. Returns metrics: cost (of full width's FLOPs), quality and mean width there.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    costs = level_costs(model.config, trainer.args.max_length)
    widths = torch.tensor([float(width) for width in model.config.width_levels.values()])
    observed = observe_prompts(trainer)
    shares = {source: mix[source] / sum(mix[name] for name in observed) for source in observed}

    def cost(confidence: float) -> float:
        return sum(share * costs[observed[name].at(confidence)[0]].mean().item() for name, share in shares.items())

    confidence = max((value for value in CONFIDENCES if cost(value) <= budget), default=CONFIDENCES[0])
    model.generation_config.router_confidence = confidence
    metrics = {"router_budget": budget, "router_confidence": confidence, "router_cost": cost(confidence)}
    for source, prompts in observed.items():
        level, quality = prompts.at(confidence)
        metrics[f"router_cost_{source}"] = costs[level].mean().item()
        metrics[f"router_quality_{source}"] = quality.mean().item()
        metrics[f"router_mean_width_{source}"] = widths[level].mean().item()
    return metrics
