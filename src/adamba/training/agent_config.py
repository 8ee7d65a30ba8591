"""Recipe keys of reinforcement learning with environments, alone or in a team."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOConfig

from adamba.errors import UserError
from adamba.launch import is_true
from adamba.rewards import REWARDS
from adamba.tasks import ENVIRONMENTS
from adamba.tasks.roles import ROLES, select_roles
from adamba.training.at_grpo import TeamSettings
from adamba.training.caps import SpendingCaps
from adamba.training.hub_keys import HubKeys
from adamba.training.optimizers import OptimizerKeys

DEFAULT_TOOL_CALLS = 8  # of tasks whose environments set no limit: the longest game has 5 moves


@dataclass
class AgentConfig(SpendingCaps, HubKeys, OptimizerKeys, GRPOConfig):
    """`GRPOConfig` and what playing the tasks adds."""

    trust_remote_code: bool = field(default=False, init=False)  # the key is ModelArguments'
    rewards: dict[str, float] = field(
        default_factory=lambda: {"correctness": 1.0, "format": 0.2},
        metadata={"help": f"Reward -> weight: {', '.join(REWARDS)}. A team is paid by alpha instead."},
    )
    num_prompts: int = field(default=2048, metadata={"help": "Different instances to play."})
    unsolved_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Play all prompts once before training, and keep those not solved and so many others that "
            "this share is not solved."
        },
    )
    num_eval_prompts: int = field(
        default=0,
        metadata={
            "help": "Held-out instances for eval_strategy and load_best_model_at_end. A team plays each "
            "num_generations_eval times to its end; eval_reward is the mean final score."
        },
    )
    max_generated_tokens: int | None = field(
        default=None, metadata={"help": "Stop after this many tokens that the model wrote."}
    )
    roles: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": f"AT-GRPO by a team: role -> {{system_prompt, tools}}, in order: {', '.join(ROLES)}."},
    )
    policy: Literal["shared", "per_role"] = field(
        default="shared", metadata={"help": "One policy for all roles, or a LoRA adapter a role on a shared base."}
    )
    alpha: float = field(default=5.0, metadata={"help": "A candidate of a team earns alpha * team + local."})
    turn_discount: float = field(default=1.0, metadata={"help": "Groups of turn t weigh its t-th power in the loss."})
    max_turns: int = field(default=12, metadata={"help": "Turns after which a team's game is over."})
    num_parallel_games: int = field(
        default=8,
        metadata={"help": "Games of a team at once; those that a batch leaves unfinished go on in the next."},
    )
    stray_fraction: float = field(
        default=0.0,
        metadata={"help": "How often a team's game goes on from any candidate, not the best: it meets its mistakes."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        split = "FSDP" if is_true("ACCELERATE_USE_FSDP") else "ZeRO-3" if is_deepspeed_zero3_enabled() else None
        if split is not None:  # each step of either is all processes' together, and they would wait for ever
            raise UserError(
                f"accelerate config: {split} splits the weights, but each process plays its own episodes to their own "
                f"ends; use zero2.yaml, zero1.yaml or ddp.yaml"
            )
        for name in ("num_prompts", "max_turns", "num_parallel_games"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} must be 1 or more")
        if self.eval_strategy != "no" and self.num_eval_prompts < 1:
            raise UserError(f"eval_strategy: {self.eval_strategy} needs num_eval_prompts above 0")
        if self.unsolved_fraction is not None and not 0 < self.unsolved_fraction <= 1:
            raise UserError(f"unsolved_fraction: {self.unsolved_fraction} must be above 0 and at most 1")
        if self.unsolved_fraction is not None and self.roles:
            raise UserError("unsolved_fraction: one agent plays the prompts; leave it out with roles")
        if not 0 < self.turn_discount <= 1:
            raise UserError(f"turn_discount: {self.turn_discount} must be above 0 and at most 1")
        if not 0 <= self.stray_fraction <= 1:
            raise UserError(f"stray_fraction: {self.stray_fraction} must be between 0 and 1")
        if self.alpha < 0:
            raise UserError(f"alpha: {self.alpha} must be 0 or more")
        if self.roles and self.metric_for_best_model in ("loss", "eval_loss"):  # the first is transformers' default
            raise UserError(
                f"metric_for_best_model: {self.metric_for_best_model} is not known of a team's games; use eval_reward"
            )
        if self.policy == "per_role" and not self.roles:
            raise UserError("policy: per_role needs roles, for instance {planner: {}, actor: {}}")


def team_settings(args: AgentConfig, environments: Iterable[str]) -> TeamSettings:
    """How the recipe's team plays.

    Raises:
        UserError: roles that do not exist, or do not fit an environment.
    """
    teams = {select_roles(args.roles, ENVIRONMENTS[name]) for name in environments}
    return TeamSettings(
        roles=teams.pop(),
        max_turns=args.max_turns,
        alpha=args.alpha,
        turn_discount=args.turn_discount,
        num_parallel_games=args.num_parallel_games,
        stray_fraction=args.stray_fraction,
        per_role=args.policy == "per_role",
    )


def tool_call_limit(rows: Iterable[dict[str, Any]]) -> int:
    """Tool calls that the longest of these episodes may take: TRL's loop does not end with the environment."""
    limit = DEFAULT_TOOL_CALLS
    environments: dict[str, Any] = {}
    for row in rows:
        name = row["environment"]
        environment = environments.setdefault(name, ENVIRONMENTS[name]())
        environment.reset(**{key: value for key, value in row.items() if key != "environment"})
        limit = max(limit, getattr(environment, "_max_calls", 0))
    return limit
