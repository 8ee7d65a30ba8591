"""Held-out play of one agent or of a team: the same figures and transcripts of both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adamba.tasks.roles import Role
from adamba.training.games import Game, is_success, play_games, without_room
from adamba.training.play import Episode, generate_turns, max_prompt_tokens
from adamba.training.role_adapters import activate

Row = dict[str, Any]


@dataclass(frozen=True)
class Played:
    """One episode, of whoever played it.

    Attributes:
        success: Whether the goal was reached.
        num_turns: Turns in which the environment could change.
        num_actions: What was said that should have been used, and `num_invalid_actions` of it could not.
        transcript: Who said what, boards between.
    """

    success: bool
    num_turns: int
    num_actions: int
    num_invalid_actions: int
    num_generated_tokens: int
    transcript: list[str] = field(default_factory=list)


def play_team(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    roles: Sequence[Role],
    *,
    max_turns: int,
    max_new_tokens: int,
    adapters: Mapping[str, str] | None = None,
) -> list[Played]:
    """Each role speaks once a turn, its likeliest words. A game that leaves no room for a reply ends there.

    Args:
        adapters: Role → the adapter that speaks for it; None when all share one policy.

    Raises:
        UserError: no game has room for a reply.
    """

    def speak(prompts: list[list[int]], role: str) -> list[list[int]]:
        if adapters is not None:
            activate(model, adapters[role])
        return generate_turns(model, tokenizer, prompts, {"max_new_tokens": max_new_tokens, "do_sample": False})

    was_training = model.training
    model.eval()
    limit = max_prompt_tokens(model, max_new_tokens)
    with torch.no_grad():
        groups, games = play_games(
            iter(rows),
            roles,
            tokenizer,
            speak,
            max_turns=max_turns,
            num_parallel=min(len(rows), 128),
            max_prompt_tokens=limit,
        )
    model.train(was_training)
    if not groups and any(game.no_room for game in games):
        raise without_room(limit)
    return [_of_game(game) for game in games]


def _of_game(game: Game) -> Played:
    lines = [Game.start(game.row, game.roles).observation()]
    for role, text, result in game.log:
        lines += [f"{role}: {text.strip()}", *([result] if result else [])]
    return Played(
        success=game.success,
        num_turns=game.turn + (game.agent > 0),
        num_actions=game.num_actions,
        num_invalid_actions=game.num_invalid_actions,
        num_generated_tokens=game.num_generated_tokens,
        transcript=lines,
    )


def of_episode(episode: Episode) -> Played:
    """An episode of one agent. Ending it before the environment is done counts as an action that could not be used."""
    gave_up = episode.finished and not is_success(episode.outcome)
    num_calls = episode.valid_calls + episode.invalid_calls
    lines = []
    for message in episode.messages:
        calls = [f"{call['function']['name']}({_arguments(call)})" for call in message.get("tool_calls") or ()]
        text = " ".join(filter(None, [message.get("content") or "", *calls]))
        lines.append(f"agent: {text}" if message["role"] == "assistant" else text)
    return Played(
        success=is_success(episode.outcome),
        num_turns=num_calls,
        num_actions=num_calls + gave_up,
        num_invalid_actions=episode.invalid_calls + gave_up,
        num_generated_tokens=episode.num_generated_tokens,
        transcript=lines,
    )


def _arguments(call: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in call["function"]["arguments"].items())


def summary(played: Sequence[Played]) -> dict[str, float]:
    """Figures of one arm, without the interval."""
    count = len(played)
    actions = sum(one.num_actions for one in played)
    return {
        "success_rate": sum(one.success for one in played) / count,
        "episodes": count,
        "mean_turns": sum(one.num_turns for one in played) / count,
        "invalid_action_rate": sum(one.num_invalid_actions for one in played) / max(actions, 1),
        "tokens_per_episode": sum(one.num_generated_tokens for one in played) / count,
    }


def examples(played: Sequence[Played], num_each: int) -> list[dict[str, Any]]:
    """The first wins and the first losses, with everything said."""
    wins = [one for one in played if one.success][:num_each]
    losses = [one for one in played if not one.success][:num_each]
    return [{"won": one.success, "lines": one.transcript} for one in wins + losses]
