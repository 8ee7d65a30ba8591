"""The agent loop of evaluation: many episodes at once, one `generate` call a turn for all that are still live."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adamba.data.render import chat_ids
from adamba.errors import UserError
from adamba.tasks import ENVIRONMENTS, tool_methods, tool_schemas
from adamba.tools import parse_tool_calls, run_tool_call
from adamba.tools.calls import FIRST_THOUGHT, PIECE

Message = dict[str, Any]
Row = dict[str, Any]
MIN_TURNS = 12  # enough for tasks that set no limit of their own


@dataclass
class Episode:
    """One conversation between a model and an environment.

    Attributes:
        row: The task row it was played from.
        messages: The whole conversation, prompt included. A turn with a call that could not be read, or a
            thought that does not come first or has no end, is its text.
        final_text: What the model said last without calling a tool; empty when it never did.
        outcome: The environment's `_outcome`.
        valid_calls: Tool calls that ran and that the environment accepted.
        invalid_calls: Calls that could not be read, do not fit the tool, or were refused by the environment.
        num_prompt_tokens: Tokens of the prompt.
        num_generated_tokens: Tokens the model wrote, ends of turn included.
        num_turns: The model's turns.
        finished: Whether it ended with a turn that called nothing (not by `max_turns` or the end of the context).
        cut: Whether `max_new_tokens` ended its last turn.
    """

    row: Row
    messages: list[Message]
    final_text: str = ""
    outcome: dict[str, float] = field(default_factory=dict)
    valid_calls: int = 0
    invalid_calls: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_turns: int = 0
    finished: bool = False
    cut: bool = False


@dataclass
class _Live:
    """An episode being played: `ids` is its whole context, the model's own tokens exactly as it wrote them."""

    episode: Episode
    environment: Any
    ids: list[int]
    last_turn: bool = False


class ToolResultIds:
    """Token ids of tool results, each up to where the assistant speaks again.

    They are appended after the model's own ids, as TRL does in training: what the model wrote is never turned into
    text and back.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[tuple[tuple[str, str], ...], list[int]] = {}

    def __call__(self, results: list[Message]) -> list[int]:
        """Ids that follow the end-of-turn token when the tools answer `results`.

        Raises:
            ValueError: the chat template rewrites earlier messages when later ones follow.
        """
        key = tuple((result["name"], result["content"]) for result in results)
        if key not in self._cache:
            call = {"type": "function", "function": {"name": results[0]["name"], "arguments": {}}}
            before: list[Message] = [
                {"role": "user", "content": "-"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
            ]
            prefix = chat_ids(self._tokenizer, before)
            whole = chat_ids(self._tokenizer, before + results, add_generation_prompt=True)
            eos = self._tokenizer.eos_token_id
            prefix = prefix[: len(prefix) - prefix[::-1].index(eos)] if eos in prefix else prefix
            if whole[: len(prefix)] != prefix:
                raise ValueError("chat template: earlier messages change when a tool result follows them")
            self._cache[key] = whole[len(prefix) :]
        return self._cache[key]


def play(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    max_turns: int | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 256,
    generate_kwargs: dict[str, Any] | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Episode]:
    """Play one episode a row and return them in the order of the rows.

    Each turn of the model is read for tool calls; their results, or a message saying what is wrong with a call, go
    back to it. An episode ends with a turn that calls nothing, with the turn after the environment is done, or after
    `max_turns` turns. One whose context has no room for `max_new_tokens` more ends there.

    Args:
        model: Anything with transformers' `generate`.
        tokenizer: With a chat template whose `eos_token` ends a turn.
        rows: Rows of `Task.prompt`; `environment` names the environment, the others reset it.
        max_turns: Most turns of the model in an episode; None: as many as the longest of them may take, 12 at least.
        max_new_tokens: Most tokens in one turn.
        batch_size: Most episodes in one `generate` call.
        generate_kwargs: More arguments of `generate`, e.g. `{"width": 64, "exit_threshold": 0.9}`.
        temperature: 0 takes the likeliest token.
        seed: Of the sampling when `temperature` is above 0.

    Raises:
        UserError: no prompt leaves room for `max_new_tokens` in the model's context.
    """
    options = dict(generate_kwargs or {}, max_new_tokens=max_new_tokens, do_sample=temperature > 0)
    if temperature > 0:
        options["temperature"] = temperature
    result_ids = ToolResultIds(tokenizer)
    live = [_start(tokenizer, row) for row in rows]
    episodes = [item.episode for item in live]
    environments = [item.environment for item in live]
    limit = max_prompt_tokens(model, max_new_tokens)
    if live and limit is not None and min(len(item.ids) for item in live) > limit:
        raise UserError(
            f"max_new_tokens: {max_new_tokens} after a prompt are more than the model's context of "
            f"{limit + max_new_tokens} (unsolved_fraction plays with max_completion_length)"
        )
    if max_turns is None:
        max_turns = max([MIN_TURNS, *(getattr(item.environment, "_max_calls", 0) + 1 for item in live)])
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[], enabled=temperature > 0):
            if temperature > 0:
                torch.manual_seed(seed)
            for _ in range(max_turns):
                live = [item for item in live if limit is None or len(item.ids) <= limit]
                # Neighbours of like length share a batch, so little of it is padding.
                live.sort(key=lambda item: len(item.ids))
                still_live = []
                for batch in _batches(live, batch_size):
                    turns = generate_turns(model, tokenizer, [item.ids for item in batch], options)
                    for item, new_ids in zip(batch, turns, strict=True):
                        if _take_turn(item, new_ids, tokenizer, result_ids):
                            still_live.append(item)
                live = still_live
                if not live:
                    break
    finally:
        model.train(was_training)
    for episode, environment in zip(episodes, environments, strict=True):
        episode.outcome = environment._outcome(episode.final_text)
        episode.valid_calls = int(episode.outcome["valid_calls"])
        episode.invalid_calls += int(episode.outcome["invalid_calls"])
    return episodes


def max_prompt_tokens(model: PreTrainedModel, max_new_tokens: int) -> int | None:
    """Most tokens of a prompt that leave room for a turn in the model's context; None where that has no end."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return None if limit is None else limit - max_new_tokens


def _start(tokenizer: PreTrainedTokenizerBase, row: Row) -> _Live:
    """Reset an environment for the row and render its prompt."""
    name = row["environment"]
    if name not in ENVIRONMENTS:
        raise ValueError(f"row: environment is {name!r}; known ones are {', '.join(ENVIRONMENTS)}")
    environment = ENVIRONMENTS[name]()
    messages = [dict(message) for message in row["prompt"]]
    observation = environment.reset(**{key: value for key, value in row.items() if key != "environment"})
    if observation:
        messages[-1]["content"] += observation
    ids = chat_ids(tokenizer, messages, tool_schemas(ENVIRONMENTS[name]) or None, add_generation_prompt=True)
    return _Live(Episode(row, messages, num_prompt_tokens=len(ids)), environment, list(ids))


def _batches(items: list[_Live], size: int) -> Iterator[list[_Live]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def generate_turns(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], options: dict[str, Any]
) -> list[list[int]]:
    """One turn after every prompt: new ids up to and including the end of turn, when it came."""
    longest = max(len(ids) for ids in prompts)
    eos = tokenizer.eos_token_id
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    padded = [[pad] * (longest - len(ids)) + ids for ids in prompts]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    output = model.generate(  # type: ignore[operator]
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        eos_token_id=eos,
        pad_token_id=pad,
        **options,
    )
    new = output[:, longest:].tolist()
    return [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in new]


def _take_turn(item: _Live, new_ids: list[int], tokenizer: PreTrainedTokenizerBase, result_ids: ToolResultIds) -> bool:
    """Append a turn of the model and the answers to its calls. Returns whether the episode goes on."""
    episode = item.episode
    episode.num_turns += 1
    episode.num_generated_tokens += len(new_ids)
    item.ids += new_ids
    episode.cut = new_ids[-1:] != [tokenizer.eos_token_id]
    if episode.cut:  # close the turn, as the template has it
        item.ids.append(tokenizer.eos_token_id)
    text = tokenizer.decode(new_ids, skip_special_tokens=True)
    thought = FIRST_THOUGHT.match(text)
    content, calls = parse_tool_calls(text)
    message: Message = {"role": "assistant", "content": content}
    if thought and thought[1].strip():
        message["reasoning_content"] = thought[1].strip("\n")
    if calls:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in calls
        ]
    later_thought = any(piece["call"] is None for piece in PIECE.finditer(text, thought.end() if thought else 0))
    if later_thought or any(call.error for call in calls):  # DPO must reject what was written, not what was understood
        message = {"role": "assistant", "content": text}
    episode.messages.append(message)
    if not calls:
        episode.final_text, episode.finished = content, True
        return False
    if item.last_turn:  # the environment was done, yet the model called again
        episode.invalid_calls += len(calls)
        return False
    results = []
    for call in calls:
        answer, called = run_tool_call(call, tool_methods(item.environment))
        episode.invalid_calls += not called
        results.append({"role": "tool", "name": call.name, "content": answer})
    episode.messages += results
    item.ids += result_ids(results)
    item.last_turn = item.environment._done
    return True


def score_episodes(task_id: str, episodes: Sequence[Episode]) -> dict[str, float]:
    """Flat metrics of episodes of one task.

    - calculator: `accuracy_calculator`, `valid_tool_call_rate_calculator`, `tool_calls_calculator` (how many that rate
      is of), `episodes_calculator`.
    - tic_tac_toe: `legal_move_rate_tic_tac_toe`, `moves_tic_tac_toe`, `score_tic_tac_toe`, and for each opponent met
      `{win,draw,loss}_rate_tic_tac_toe_{opponent}` and `episodes_tic_tac_toe_{opponent}`. A game left unfinished or
      forfeited is lost.
    - any other task: `score_{task}`, `valid_tool_call_rate_{task}`, `tool_calls_{task}`, `episodes_{task}`.

    A rate of valid calls counts an episode that made none of the calls it needed as one invalid call.

    Raises:
        ValueError: no episodes.
    """
    if not episodes:
        raise ValueError(f"score_episodes: no episodes of task {task_id}")
    scores = [episode.outcome["score"] for episode in episodes]
    valid_rate, num_calls = _valid_calls(episodes)
    if task_id == "tic_tac_toe":
        metrics = {"legal_move_rate_tic_tac_toe": valid_rate, "moves_tic_tac_toe": float(num_calls)}
        metrics["score_tic_tac_toe"] = _mean(scores)
        for opponent in sorted({episode.row["opponent"] for episode in episodes}):
            games = [episode for episode in episodes if episode.row["opponent"] == opponent]
            metrics[f"episodes_tic_tac_toe_{opponent}"] = float(len(games))
            for result in ("win", "draw", "loss"):
                rate = _mean([game.outcome[result] for game in games])
                metrics[f"{result}_rate_tic_tac_toe_{opponent}"] = rate
        return metrics
    accuracy = "accuracy_calculator" if task_id == "calculator" else f"score_{task_id}"
    return {
        accuracy: _mean(scores),
        f"valid_tool_call_rate_{task_id}": valid_rate,
        f"tool_calls_{task_id}": float(num_calls),
        f"episodes_{task_id}": float(len(episodes)),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _valid_calls(episodes: Sequence[Episode]) -> tuple[float, int]:
    """Share of valid calls, and of how many."""
    valid = sum(episode.valid_calls for episode in episodes)
    invalid = sum(episode.invalid_calls for episode in episodes)
    missing = sum(
        episode.valid_calls + episode.invalid_calls == 0 and episode.outcome["best_calls"] > 0 for episode in episodes
    )
    total = valid + invalid + missing
    return (valid / total if total else 1.0), total
