"""AT-GRPO through TRL: each block of `num_generations` rows of a batch is one (instance, agent, turn) group.

GRPOTrainer normalises advantages over consecutive blocks of `num_generations` rows; `rollout_func` fills each block
with the candidates of one group (`adamba.training.games`), so its own normalisation is the one inside the group.
Loss, clipping (`epsilon`), KL (`beta`), entropy and logging are TRL's.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from adamba.errors import UserError
from adamba.tasks.roles import Role
from adamba.training.agent_rows import own_columns
from adamba.training.agent_trainer import AgentGRPOTrainer
from adamba.training.games import Game, Group, play_games, without_room
from adamba.training.play import max_prompt_tokens
from adamba.training.role_adapters import activate, role_weights, save_roles, train_all_roles


@dataclass(frozen=True)
class TeamSettings:
    """How a team plays and is paid.

    Attributes:
        roles: In the order they speak.
        max_turns: Turns after which a game is over.
        alpha: A candidate's reward is `alpha` × team + local.
        turn_discount: Groups of turn t weigh its t-th power.
        num_parallel_games: Games played at once; those that a batch leaves unfinished go on in the next one.
        stray_fraction: How often any candidate is continued in place of the best.
        per_role: One LoRA adapter a role.
    """

    roles: tuple[Role, ...]
    max_turns: int = 12
    alpha: float = 5.0
    turn_discount: float = 1.0
    num_parallel_games: int = 8
    stray_fraction: float = 0.0
    per_role: bool = False


def team(prompts: list, completions: list, team_reward: list[float], **columns: object) -> list[float]:
    """Worth of the state that a candidate leads to."""
    return team_reward


def local(prompts: list, completions: list, local_reward: list[float], **columns: object) -> list[float]:
    """Whether a candidate does what its role should."""
    return local_reward


def check_groups(groups: Sequence[Group], rows_per_group: int, num_rows: int) -> None:
    """Refuse a batch in which a block of rows is not one group.

    Raises:
        RuntimeError: saying which group.
    """
    if len(groups) * rows_per_group != num_rows:
        raise RuntimeError(f"AT-GRPO: {len(groups)} groups of {rows_per_group} do not fill {num_rows} rows")
    for group in groups:
        if len(group.replies) != rows_per_group or len(group.candidates) != rows_per_group:
            raise RuntimeError(f"AT-GRPO: group {group.key} has {len(group.replies)} candidates, not {rows_per_group}")
        if group.key[2] != group.turn or not all(group.replies):
            raise RuntimeError(f"AT-GRPO: group {group.key} is of turn {group.turn}, or has an empty reply")


class AtGrpoTrainer(AgentGRPOTrainer):
    """GRPO on the candidates of games; takes no rewards and no environments of its own."""

    def __init__(self, *, team_settings: TeamSettings, **kwargs: Any) -> None:
        args = kwargs["args"]
        rows = args.per_device_train_batch_size * args.steps_per_generation
        if rows % args.num_generations:
            raise UserError(
                f"num_generations: {args.num_generations} candidates do not divide the {rows} rows of a process "
                f"(per_device_train_batch_size × steps_per_generation)"
            )
        args.reward_weights = [team_settings.alpha, 1.0]
        self.team_settings = team_settings
        self._rows: list[dict[str, Any]] = []
        self._groups: list[Group] = []
        self._games: list[Game] = []
        self._row_roles: torch.Tensor | None = None
        self._taught_roles: set[int] = set()  # whose adapters have a gradient on this process since the last step
        # TRL would copy an adapter named "default" as the reference; ours is the base, with all adapters off.
        beta = args.beta
        if team_settings.per_role:
            args.beta = 0.0
        super().__init__(reward_funcs=[team, local], rollout_func=self._play_batch, **kwargs)
        self.beta = args.beta = beta
        if team_settings.per_role and args.world_size > 1:
            self.add_callback(_OnlyTaughtRolesMove(self))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.team_settings.per_role:
            train_all_roles(self.accelerator.unwrap_model(self.model))
        return super().create_optimizer(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A checkpoint to resume from holds the adapters; what is published, the base beside them."""
        if self.team_settings.per_role and not _internal_call and output_dir is not None:
            if self.is_world_process_zero():
                save_roles(self.accelerator.unwrap_model(self.model), Path(output_dir))
            return
        super().save_model(output_dir, _internal_call)

    def _load_best_model(self) -> None:
        """The Trainer looks for one adapter, and would leave all roles as the last step left them."""
        if not self.team_settings.per_role or self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        model = self.accelerator.unwrap_model(self.model)
        for role in self.team_settings.roles:
            model.load_adapter(Path(self.state.best_model_checkpoint) / role.name, role.name, is_trainable=True)

    def _save_rng_state(self, output_dir: str) -> None:
        """And the games that the next batch goes on with."""
        super()._save_rng_state(output_dir)
        records = [game.record() for game in self._games]
        self._games_file(output_dir).write_text(json.dumps(records), encoding="utf-8")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and self._games_file(checkpoint).is_file():
            records = json.loads(self._games_file(checkpoint).read_text(encoding="utf-8"))
            self._games = [Game.replay(record, self.team_settings.roles) for record in records]

    def _games_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"games_{self.args.process_index}.json"

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rows = inputs
        output = super()._generate_and_score_completions(inputs)
        blocks = output["prompt_ids"].view(len(self._groups), self.num_generations, -1)
        if not torch.equal(blocks, blocks[:, :1].expand_as(blocks)):
            raise RuntimeError("AT-GRPO: a block of rows has more than one prompt, so it is not one group")
        turns = self._of_rows([group.turn for group in self._groups])
        output["turn_discount"] = self.team_settings.turn_discount**turns
        output["advantages"] = output["advantages"] * output["turn_discount"]
        output["role_index"] = self._of_rows([group.role_index for group in self._groups])
        return output

    def _play_batch(self, prompts: list, trainer: Any) -> dict[str, Any]:
        """TRL's `rollout_func`: as many rows as prompts, in blocks that are groups."""
        settings, size = self.team_settings, self.num_generations
        seconds = 0.0

        def speak(prompt_ids: list[list[int]], role: str) -> list[list[int]]:
            nonlocal seconds
            started = time.perf_counter()
            replies = self._speak(prompt_ids, role)
            seconds += time.perf_counter() - started
            return replies

        started = time.perf_counter()
        plain = map(own_columns, self._rows[::size])
        self._groups, games = play_games(
            plain,
            settings.roles,
            self._tokenizer,
            speak,
            max_turns=settings.max_turns,
            num_parallel=settings.num_parallel_games,
            alpha=settings.alpha,
            num_candidates=size,
            num_groups=len(prompts) // size,
            stray_fraction=settings.stray_fraction,
            begun=self._games,
            max_prompt_tokens=self._max_prompt_tokens(),
        )
        self._games = [game for game in games if not game.is_over(settings.max_turns)]
        outside = time.perf_counter() - started - seconds
        check_groups(self._groups, size, len(prompts))
        self._row_roles = self._of_rows([group.role_index for group in self._groups])
        over = [game for game in games if game.is_over(settings.max_turns)]
        if over:
            self._log_metric("games/success_best", sum(game.success for game in over) / len(over))
            self._log_metric("games/num_turns", sum(game.turn for game in over) / len(over))
        self._log_metric("games/rollout_outside_generate_fraction", outside / (outside + seconds))
        for group in self._groups:
            for candidate in group.candidates:
                name = f"games/{settings.roles[group.role_index].name}/invalid_action_rate"
                self._log_metric(name, 1.0 - candidate.local)  # the mean over all processes
        candidates = [candidate for group in self._groups for candidate in group.candidates]
        return {
            "prompt_ids": [group.prompt_ids for group in self._groups for _ in range(size)],
            "completion_ids": [reply for group in self._groups for reply in group.replies],
            "logprobs": None,
            "team_reward": [candidate.team for candidate in candidates],
            "local_reward": [candidate.local for candidate in candidates],
        }

    def _speak(self, prompt_ids: list[list[int]], role: str) -> list[list[int]]:
        if self.team_settings.per_role:
            activate(self.accelerator.unwrap_model(self.model), role)
        replies, _ = self._generate_single_turn(prompt_ids, None, {}, num_generations=1)
        return replies

    def _max_prompt_tokens(self) -> int | None:
        return max_prompt_tokens(self.accelerator.unwrap_model(self.model), self.max_completion_length)

    def _of_rows(self, of_groups: list[int]) -> torch.Tensor:
        values = torch.tensor(of_groups, device=self.accelerator.device)
        return values.repeat_interleave(self.num_generations)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, **kwargs)
        if self._metrics["eval"].get("games/num_turns") == [0.0]:  # of all processes' games, so all of them stop
            raise without_room(self._max_prompt_tokens())
        return output

    def prediction_step(self, model: Any, inputs: list[dict[str, Any]], *args: Any, **kwargs: Any) -> Any:
        """
        Held-out games, a row each, played to their end by what the roles say: nobody chooses between candidates.
        `eval_reward` is their mean final score, 1 where the team plays as well as the solver, and `eval_games/*` what
        else is known of them; there is no loss.
        """
        roles, max_turns = self.team_settings.roles, self.team_settings.max_turns
        inputs = inputs[: self._read_held_out(len(inputs))]
        rows = map(own_columns, inputs)
        with self._keeping_caches():
            groups, games = play_games(
                rows,
                roles,
                self._tokenizer,
                self._speak,
                max_turns=max_turns,
                num_parallel=len(inputs),
                max_prompt_tokens=self._max_prompt_tokens(),
            )
        for game in games:
            self._evaluated["reward"].append(game.outcome["score"])
            self._evaluated["games/success"].append(float(game.success))
            self._evaluated["games/num_turns"].append(game.turn + (game.agent > 0))
        for group in groups:
            name = f"games/{roles[group.role_index].name}/invalid_action_rate"
            self._evaluated[name].append(1.0 - group.candidates[0].local)
        return None, None, None

    def _teaches(self, inputs: dict[str, Any]) -> torch.Tensor:
        """And the first row of each role: DDP waits for a gradient of every adapter that a step uses elsewhere."""
        # A late turn's advantage is small by its weight, not by rounding.
        teaches = super()._teaches(inputs | {"advantages": inputs["advantages"] / inputs["turn_discount"]})
        if self.team_settings.per_role:
            for index in inputs["role_index"].unique():
                teaches[(inputs["role_index"] == index).nonzero()[0]] = True
        return teaches

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self._row_roles = inputs["role_index"]
        if not self.team_settings.per_role:
            return super()._compute_loss(model, inputs)
        whole = self.accelerator.unwrap_model(model)
        train_all_roles(whole)  # the reference's pass has frozen some
        loss = super()._compute_loss(model, inputs)
        if self.args.world_size > 1:
            # Processes wait for a gradient of every adapter, and a batch may hold rows of some roles only.
            present = set(inputs["role_index"].unique().tolist())
            self._taught_roles |= present
            for index in set(range(len(self.team_settings.roles))) - present:
                loss = loss + 0.0 * sum(weight.sum() for weight in role_weights(whole, self._role_name(index)))
        return loss

    def _role_name(self, index: int) -> str:
        return self.team_settings.roles[index].name

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """With an adapter a role: each role's rows under its own, put back in their order."""
        parent = super()._get_per_token_logps_and_entropies
        if not self.team_settings.per_role:
            return parent(model, input_ids, *args, **kwargs)
        attention_mask, *rest = args
        assert self._row_roles is not None and len(self._row_roles) == len(input_ids)
        parts, order = [], []
        for index in self._row_roles.unique().tolist():
            own = (self._row_roles == index).nonzero().squeeze(1)
            activate(self.accelerator.unwrap_model(model), self._role_name(index))
            parts.append(parent(model, input_ids[own], attention_mask[own], *rest, **kwargs))
            order.append(own)
        back = torch.cat(order).argsort()
        logps = torch.cat([part[0] for part in parts])[back]
        entropies = None if parts[0][1] is None else torch.cat([part[1] for part in parts])[back]
        return logps, entropies, None


class _OnlyTaughtRolesMove(TrainerCallback):
    """
    In several processes an adapter that no row of a step was of has a gradient of zeros, by which weight decay and
    momentum would move it. It gets none instead, as in one process. (DeepSpeed has its own copies, which do move.)
    """

    def __init__(self, trainer: AtGrpoTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        trainer = self.trainer
        own = [index in trainer._taught_roles for index in range(len(trainer.team_settings.roles))]
        trainer._taught_roles.clear()
        taught = torch.tensor(own, dtype=torch.int, device=args.device)
        torch.distributed.all_reduce(taught, op=torch.distributed.ReduceOp.MAX)
        model = trainer.accelerator.unwrap_model(trainer.model)
        for index in (taught == 0).nonzero().flatten().tolist():
            for weight in role_weights(model, trainer._role_name(index)):
                weight.grad = None
