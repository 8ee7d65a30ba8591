"""Games of several roles in one environment: groups of candidates from one state, of which the best is continued.

This is the tree of AT-GRPO (agent- and turn-wise grouped GRPO): at each turn of each agent, K candidates are spoken
from the *same* state, judged on copies of it, and compared with each other alone. With one candidate it is plain play.
Rules only: nothing here knows the model, `speak` does.
"""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from adamba.data.render import chat_ids
from adamba.errors import UserError
from adamba.tasks import ENVIRONMENTS, tool_methods
from adamba.tasks.roles import MAX_NOTE_CHARACTERS, Role, accepted, refusal, role_messages, role_tools
from adamba.tools import ToolCall, parse_tool_calls, run_tool_call

Row = dict[str, Any]
# Replies (token ids, end of turn included) of the role of that name to each prompt.
Speak = Callable[[list[list[int]], str], list[list[int]]]


@dataclass
class Game:
    """One episode.

    Attributes:
        row: The task row it is played from.
        notes: What was proposed in this turn: (role, text).
        results: What tools answered so far, for environments that have no observation of their own.
        past: The last call that changed the state, and those that were refused since.
        log: Everything said: (role, text, what followed).
        final_text: Of a role that answers; ends the game.
        num_actions, num_invalid_actions: What was said, and how much of it could not be used.
        no_room: The next prompt leaves no room for a reply; ends the game.
    """

    row: Row
    environment: Any
    roles: Sequence[Role]
    agent: int = 0
    turn: int = 0
    notes: list[tuple[str, str]] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    past: list[str] = field(default_factory=list)
    log: list[tuple[str, str, str]] = field(default_factory=list)
    final_text: str | None = None
    num_actions: int = 0
    num_invalid_actions: int = 0
    num_generated_tokens: int = 0
    no_room: bool = False

    @classmethod
    def start(cls, row: Row, roles: Sequence[Role]) -> "Game":
        environment = ENVIRONMENTS[row["environment"]]()
        environment.reset(**{key: value for key, value in row.items() if key != "environment"})
        return cls(row, environment, roles)

    @classmethod
    def replay(cls, record: Row, roles: Sequence[Role]) -> "Game":
        """The game of a `record`: all but the number of tokens follows from what was said."""
        game = cls.start(record["row"], roles)
        for text in record["said"]:
            advance(game, consider(game, text), num_tokens=0)
        return game

    def record(self) -> Row:
        """What the game can be replayed from, as plain JSON."""
        return {"row": self.row, "said": [text for _, text, _ in self.log]}

    @property
    def role(self) -> Role:
        """Whose move it is."""
        return self.roles[self.agent]

    @property
    def key(self) -> tuple[str, str, int]:
        """(instance, agent, turn): what all candidates of a group have in common."""
        instance = f"{self.row['environment']}/{self.row.get('split')}/{self.row.get('seed')}"
        return instance, self.role.name, self.turn

    @property
    def outcome(self) -> dict[str, float]:
        return self.environment._outcome(self.final_text or "")

    @property
    def success(self) -> bool:
        return is_success(self.outcome)

    def is_over(self, max_turns: int) -> bool:
        return self.environment._done or self.final_text is not None or self.turn >= max_turns or self.no_room

    def observation(self) -> str:
        """The state as any role reads it."""
        if hasattr(self.environment, "_observation"):
            return "\n".join([self.environment._observation(), *self.past])
        return "\n".join([self.row["prompt"][-1]["content"], *self.results])


@dataclass(frozen=True)
class Candidate:
    """What one reply would lead to.

    Attributes:
        text: The reply.
        environment: The state after it, a copy; the group's own state where nothing changed.
        result: What was answered to a call.
        team: Worth of the state that it leads to (of a proposal: would lead to), 0 to 1.
        local: 1 when the reply could be used as its role should, else 0.
    """

    text: str
    environment: Any
    result: str
    team: float
    local: float


@dataclass(frozen=True)
class Group:
    """K candidates of one agent at one turn of one instance."""

    key: tuple[str, str, int]
    role_index: int
    turn: int
    prompt_ids: list[int]
    replies: list[list[int]]
    candidates: list[Candidate]


def is_success(outcome: dict[str, float]) -> bool:
    """Whether an episode reached its goal, however long it took."""
    return outcome.get("solved", float(outcome["score"] >= 1.0)) == 1.0


def team_value(outcome: dict[str, float]) -> float:
    """Worth of a state: its score, or half of the way done. Both depend on the board alone: circles earn nothing."""
    return max(outcome["score"], 0.5 * outcome.get("progress", 0.0))


def consider(game: Game, text: str) -> Candidate:
    """Judge a reply on a copy of the state; the game itself stays as it is."""
    content, calls = parse_tool_calls(text)
    environment, role = game.environment, game.role
    if role.speaks == "answer":
        outcome = environment._outcome(content)
        return Candidate(
            text, environment, "", team_value(outcome), float(not calls and outcome["well_formed"] == 1.0)
        )
    if role.speaks == "proposal":
        tool = getattr(environment, "_tool", None)
        usable = bool(content) and not calls and len(content) <= MAX_NOTE_CHARACTERS
        if tool is None or not usable:
            return Candidate(text, environment, "", 0.5 * team_value(environment._outcome()), float(usable))
        trial = copy.deepcopy(environment)
        getattr(trial, tool[0])(**{tool[1]: content})
        return Candidate(text, environment, "", *_judged(environment, trial))
    after = copy.deepcopy(environment)
    if len(calls) != 1:
        result = "error: call one tool" if not calls else "error: one call a turn"
        return Candidate(text, environment, result, 0.5 * team_value(environment._outcome()), 0.0)
    allowed = [tool for tool in tool_methods(after) if not role.tools or tool.__name__ in role.tools]
    result, _ = run_tool_call(calls[0], allowed)
    return Candidate(text, after, result, *_judged(environment, after))


def _judged(before: Any, after: Any) -> tuple[float, float]:
    """
    Team and local reward of a call. Half of the team's is the worth of the new state, half whether the call came as
    near as one can: where a state is worth nothing in every direction, that still tells them apart. Both compare
    candidates in one state and are never summed over turns, so going to and fro earns nothing.
    """
    old, new = before._outcome(), after._outcome()
    accepted = new["valid_calls"] > old["valid_calls"]
    good = new["good_calls"] > old["good_calls"] if "good_calls" in new else accepted
    return 0.5 * team_value(new) + 0.5 * good, float(accepted)


def advance(game: Game, candidate: Candidate, num_tokens: int) -> None:
    """Continue the game with a candidate: the next agent is to speak, or the next turn begins."""
    role = game.role
    game.num_actions += 1
    game.num_invalid_actions += not candidate.local
    game.num_generated_tokens += num_tokens
    game.environment = candidate.environment
    content, calls = parse_tool_calls(candidate.text)
    if role.speaks == "proposal":
        game.notes.append((role.name, content[:MAX_NOTE_CHARACTERS]))
    elif role.speaks == "answer":
        game.final_text = content
    else:
        argument = _argument(calls)
        game.past = [accepted(argument)] if candidate.local else [*game.past, refusal(argument, candidate.result)]
        if candidate.result:
            game.results.append(f"{role.name}: {candidate.result}")
    game.log.append((role.name, candidate.text, candidate.result))
    game.agent += 1
    if game.agent == len(game.roles):
        game.agent, game.turn, game.notes = 0, game.turn + 1, []


def _argument(calls: Sequence[ToolCall]) -> str:
    """What a reply wanted to do, in the words of its first call."""
    return " ".join(map(str, calls[0].arguments.values())) if calls else ""


def play_games(
    rows: Iterator[Row],
    roles: Sequence[Role],
    tokenizer: Any,
    speak: Speak,
    *,
    max_turns: int,
    num_parallel: int,
    alpha: float = 1.0,
    num_candidates: int = 1,
    num_groups: int | None = None,
    stray_fraction: float = 0.0,
    begun: Sequence[Game] = (),
    max_prompt_tokens: int | None = None,
) -> tuple[list[Group], list[Game]]:
    """Play games until the rows, or `num_groups`, are used up. Games that are over make room for new ones.

    Returns the groups in the order they were spoken, and all games that were played (those that are not over when
    `num_groups` ends the play can be the next one's `begun`).

    Args:
        begun: Games of an earlier play, which go on.
        stray_fraction: How often not the best candidate but any is continued. The best ones alone never lead to the
            states after a mistake, in which the team then stands when nobody chooses for it.
        max_prompt_tokens: Most that leave room for a reply; a game whose next prompt has more ends there.

    Raises:
        UserError: too few games have room for a reply to make `num_groups` groups.
        ValueError: `rows` end before `num_groups` groups were made.
    """
    live, games = list(begun), list(begun)
    groups: list[Group] = []
    while num_groups is None or len(groups) < num_groups:
        live = [game for game in live if not game.is_over(max_turns)]
        agent = min((game.agent for game in live), default=0)
        if agent == 0:  # a turn begins
            for row in rows if len(live) < num_parallel else ():
                live.append(Game.start(row, roles))
                games.append(live[-1])
                if len(live) == num_parallel:
                    break
        if not live:
            if num_groups is None:
                break
            if any(game.no_room for game in games):
                raise without_room(max_prompt_tokens)
            raise ValueError(f"play_games: the rows ended after {len(groups)} of {num_groups} groups")
        # One role speaks at a time. `num_groups` may have stopped some games before it and others behind it.
        playing = [game for game in live if game.agent == agent]
        if num_groups is not None:
            playing = playing[: num_groups - len(groups)]
        prompts = [prompt_ids(game, tokenizer) for game in playing]
        if max_prompt_tokens is not None and max(map(len, prompts)) > max_prompt_tokens:
            for game, prompt in zip(playing, prompts, strict=True):
                game.no_room = len(prompt) > max_prompt_tokens
            continue
        replies = speak([prompt for prompt in prompts for _ in range(num_candidates)], playing[0].role.name)
        for index, (game, prompt) in enumerate(zip(playing, prompts, strict=True)):
            own = replies[index * num_candidates : (index + 1) * num_candidates]
            texts = tokenizer.batch_decode(own, skip_special_tokens=True)
            judged = {text: consider(game, text) for text in dict.fromkeys(texts)}  # most of a group agree
            candidates = [judged[text] for text in texts]
            groups.append(Group(game.key, game.agent, game.turn, prompt, own, candidates))
            chosen = max(range(num_candidates), key=lambda i: alpha * candidates[i].team + candidates[i].local)
            chance = random.Random(f"{game.key}/{game.num_actions}")
            if chance.random() < stray_fraction:
                chosen = chance.randrange(num_candidates)
            advance(game, candidates[chosen], len(own[chosen]))
    return groups, games


def without_room(max_prompt_tokens: int | None) -> UserError:
    """Says what to shorten where games could not be played."""
    return UserError(
        f"games: prompts of more than {max_prompt_tokens} tokens leave no room for a reply in the model's context; "
        "shorten replies (max_new_tokens, in training max_completion_length) or the instances"
    )


def prompt_ids(game: Game, tokenizer: Any) -> list[int]:
    """What the role to move reads, as token ids."""
    return chat_ids(
        tokenizer,
        role_messages(game.role, game.observation(), game.notes),
        role_tools(game.role, type(game.environment)) or None,
        add_generation_prompt=True,
    )
