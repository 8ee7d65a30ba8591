"""Groups of candidates: one state, judged on copies, the best continued, agents in order and seeing each other."""

import copy
import json
import random
import re

import pytest

from adamba.data import train_tokenizer
from adamba.errors import UserError
from adamba.tasks import TASKS
from adamba.tasks.plan_path_rules import DIRECTIONS, position_of, walk
from adamba.tasks.roles import select_roles
from adamba.training.at_grpo import check_groups
from adamba.training.games import Game, advance, consider, play_games

PATH = TASKS["plan_path"]
SETTINGS = {"size": 4, "max_steps": 6, "moves_per_call": 2}
TEAM = select_roles(["planner", "actor"], PATH.environment)
CALL = '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>'


def rows(count: int, **settings) -> list[dict]:
    return [PATH.prompt(seed, "test", **(SETTINGS | settings)) for seed in range(count)]


def call(moves: object) -> str:
    return CALL.format("move", json.dumps({"moves": moves}))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([json.dumps(PATH.example(seed, "train")) for seed in range(20)], 277)


class Speaker:
    """Says what `say(role, board, note, number of the prompt)` says, and remembers the contexts."""

    def __init__(self, tokenizer, say) -> None:
        self.tokenizer, self.say = tokenizer, say
        self.heard: list[tuple[str, list[str]]] = []

    def __call__(self, prompts: list[list[int]], role: str) -> list[list[int]]:
        contexts = [self.tokenizer.decode(ids) for ids in prompts]
        self.heard.append((role, contexts))
        users = [context.split("<|im_start|>user\n")[1].split("<|im_end|>")[0] for context in contexts]
        said = [self.say(role, *user.partition("\nplanner: ")[::2], index) for index, user in enumerate(users)]
        return [self.tokenizer.encode(text + "<|im_end|>") for text in said]


def best_moves(observation: str) -> str:
    board = re.split("\n(?:Done|Refused)", observation)[0]
    environment = PATH.environment()
    environment.reset(grid=board.replace(" ", ""), moves_per_call=2)
    return environment._solver_argument()


def solver(role: str, board: str, note: str, index: int) -> str:
    return best_moves(board) if role == "planner" else call(note)


def test_a_team_of_solvers_wins_with_the_least_turns(tokenizer) -> None:
    _, games = play_games(iter(rows(12)), TEAM, tokenizer, Speaker(tokenizer, solver), max_turns=9, num_parallel=5)
    assert len(games) == 12 and all(game.success for game in games)
    for game in games:
        assert game.turn == game.environment._best_calls and game.outcome["score"] == 1.0
        assert game.num_invalid_actions == 0 and game.num_actions == 2 * game.turn


def test_agents_speak_in_order_and_see_each_other_and_the_new_state(tokenizer) -> None:
    speaker = Speaker(tokenizer, solver)
    play_games(iter(rows(3, max_steps=8)), TEAM, tokenizer, speaker, max_turns=9, num_parallel=3)
    assert [role for role, _ in speaker.heard[:4]] == ["planner", "actor", "planner", "actor"]
    (_, plans), (_, acts), (_, later) = speaker.heard[:3]
    assert all("planner: " not in context for context in plans)
    assert all(f"planner: {best_moves(board_of(plan))}" in act for plan, act in zip(plans, acts, strict=True))
    assert not {board_of(context) for context in later} & {board_of(context) for context in plans}, "state is frozen"


def board_of(context: str) -> str:
    return context.split("<|im_start|>user\n")[1].split("<|im_end|>")[0].partition("\nplanner: ")[0]


def test_a_group_is_one_instance_agent_and_turn_and_the_best_is_continued(tokenizer) -> None:
    def say(role: str, board: str, note: str, index: int) -> str:
        if role == "planner":
            return best_moves(board) if index % 4 == 2 else ("", "UU?", "DDDDDD", "R")[index % 4]
        return call(best_moves(board)) if index % 4 == 1 else "nothing"

    speaker = Speaker(tokenizer, say)
    groups, games = play_games(
        iter(rows(40)), TEAM, tokenizer, speaker, max_turns=9, num_parallel=3, num_candidates=4, num_groups=30
    )
    check_groups(groups, 4, 120)
    assert len({group.key for group in groups}) == 30, "one instance fills two groups of the same agent and turn"
    assert {len(contexts) for _, contexts in speaker.heard} <= {4, 8, 12}
    for _, contexts in speaker.heard:
        for start in range(0, len(contexts), 4):
            assert len(set(contexts[start : start + 4])) == 1, "a group mixes states"
    for group in groups:
        rewards = [5 * one.team + one.local for one in group.candidates]
        best = 2 if group.key[1] == "planner" else 1
        assert rewards[best] == max(rewards) > min(rewards)
        states = [one.environment for one in group.candidates]
        assert len({state._position for index, state in enumerate(states) if index != best}) == 1
    assert all(game.success for game in games if game.is_over(9))


def test_games_go_on_in_the_next_batch_as_if_there_was_one(tokenizer) -> None:
    def play(*pieces: int) -> dict:
        left, games, rewards = iter(rows(40, min_steps=3)), [], {}
        for num_groups in pieces:
            groups, games = play_games(
                left,
                TEAM,
                tokenizer,
                Speaker(tokenizer, lambda *said: "nothing" if said[3] % 2 else solver(*said)),
                max_turns=9,
                num_parallel=5,
                num_candidates=2,
                num_groups=num_groups,
                begun=[
                    Game.replay(json.loads(json.dumps(game.record())), TEAM) for game in games if not game.is_over(9)
                ],
            )
            rewards |= {group.key: [(one.team, one.local) for one in group.candidates] for group in groups}
        return rewards

    whole = play(40)
    assert len(whole) == 40 and {turn for _, _, turn in whole} >= {0, 1, 2}
    assert play(*[5] * 8) == whole
    assert play(*[8] * 5).items() >= dict(list(whole.items())[:30]).items(), "stopped where some have spoken"


def test_a_replayed_game_stands_where_it_stood(tokenizer) -> None:
    def say(role: str, board: str, note: str, index: int) -> str:
        return "nothing" if index == 1 else solver(role, board, note, index)

    for num_groups in (3, 5, 8):
        speaker, options = Speaker(tokenizer, say), {"max_turns": 9, "num_parallel": 3, "num_groups": num_groups}
        for game in play_games(iter(rows(9, min_steps=5)), TEAM, tokenizer, speaker, **options)[1]:
            again = Game.replay(json.loads(json.dumps(game.record())), TEAM)
            assert again.observation() == game.observation() and again.outcome == game.outcome
            for name in ("agent", "turn", "notes", "past", "results", "log", "key", "num_invalid_actions"):
                assert getattr(again, name) == getattr(game, name), name


def test_a_game_ends_where_its_prompt_leaves_no_room_for_a_reply(tokenizer) -> None:
    def play(limit: int | None, **options) -> tuple[list, list[Game]]:
        speaker = Speaker(tokenizer, lambda role, *said: call("?") if role == "actor" else "?")
        options = {"max_turns": 9, "num_parallel": 4, "max_prompt_tokens": limit} | options
        return play_games(iter(rows(6)), TEAM, tokenizer, speaker, **options)

    groups, games = play(None)  # what was refused is shown again, so prompts grow
    lengths = [len(group.prompt_ids) for group in groups]
    assert [game.turn for game in games] == [3] * 6
    limit = max(lengths) - 1
    cut, short = play(limit)
    assert max(len(group.prompt_ids) for group in cut) <= limit and len(short) == 6
    assert {game.turn for game in short} >= {2} and all(game.is_over(9) for game in short)
    nothing_said, lost = play(min(lengths) - 1)
    assert not nothing_said and len(lost) == 6 and all(game.no_room for game in lost)
    with pytest.raises(UserError, match=f"games: prompts of more than {limit} tokens leave no room"):
        play(limit, num_groups=len(groups))


def test_strays_meet_their_mistakes_the_same_each_time(tokenizer) -> None:
    def say(role: str, board: str, note: str, index: int) -> str:
        move = best_moves(board)
        return (move if role == "planner" else call(move)) if index % 4 == 2 else "nothing"

    def play(fraction: float) -> list[tuple[int, int]]:
        _, games = play_games(
            iter(rows(20)),
            TEAM,
            tokenizer,
            Speaker(tokenizer, say),
            max_turns=9,
            num_parallel=20,
            num_candidates=4,
            stray_fraction=fraction,
        )
        return [(game.num_invalid_actions, game.num_actions) for game in games]

    assert all(invalid == 0 for invalid, _ in play(0.0))
    strays = play(1.0)
    share = sum(invalid for invalid, _ in strays) / sum(number for _, number in strays)
    assert 0.2 < share < 0.8 and strays == play(1.0)


def test_both_agents_rewards_differ_between_their_candidates() -> None:
    for turns_before in (0, 1):
        game = Game.start(rows(5, min_steps=5)[3], TEAM)
        for _ in range(turns_before):
            for text in (best_moves(game.observation()), call(best_moves(game.observation()))):
                advance(game, consider(game, text), 1)
        plan = best_moves(game.observation())
        good, bad = consider(game, plan), consider(game, "?")
        assert (good.team, good.local) > (bad.team, bad.local)
        advance(game, good, 1)
        good, bad = consider(game, call(plan)), consider(game, call("UUUUUUU"))
        assert good.team > bad.team and (good.local, bad.local) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\x00�~~ garbage", "error: call one tool"),
        ("", "error: call one tool"),
        ('<tool_call>\n{"name": "move", "argu', "error: the tool call is not valid JSON"),
        (CALL.format("fly", "{}"), "error: no tool named 'fly'; there is move"),
        (CALL.format("move", '{"moves": 3}'), "Not moves."),
        (CALL.format("move", '{"moves": ["R"], "speed": 2}'), "error: move: got an unexpected keyword argument"),
        (CALL.format("move", "[1]"), "error: the arguments are not a JSON object"),
        (call("R") + call("R"), "error: one call a turn"),
        ("word " * 10_000, "error: call one tool"),
    ],
)
def test_what_cannot_be_used_is_answered_and_costs_the_turn(text: str, answer: str) -> None:
    game = Game.start(rows(1)[0], TEAM[1:])
    before = copy.deepcopy(game.environment)
    candidate = consider(game, text)
    assert answer in candidate.result and candidate.local == 0.0
    assert candidate.team <= consider(game, call(best_moves(game.observation()))).team
    advance(game, candidate, 3)
    assert game.environment._position == before._position
    assert (game.turn, game.num_actions, game.num_invalid_actions) == (1, 1, 1) and not game.success


def test_roles_read_what_was_done_last_and_refused_since() -> None:
    game = Game.start(rows(9, min_steps=5)[0], TEAM)
    board, grid = game.observation(), game.row["grid"]
    blocked = next(move for move in DIRECTIONS if walk(grid, position_of(grid), move) is None)
    for text in ("no matter", call(blocked), "no matter", "?"):
        advance(game, consider(game, text), 1)
    assert game.observation() == f"{board}\nRefused: {blocked} Blocked.\nRefused: error: call one tool"
    for text in ("no matter", call(best_moves(board))):
        advance(game, consider(game, text), 1)
    assert game.observation() == f"{game.environment._observation()}\nDone: {best_moves(board)}"
    assert board not in game.observation()
    for text in ("no matter", "?"):
        advance(game, consider(game, text), 1)
    assert game.observation().endswith(f"\nDone: {best_moves(board)}\nRefused: error: call one tool")


def test_running_out_of_turns_is_no_success(tokenizer) -> None:
    groups, games = play_games(
        iter(rows(4)), TEAM, tokenizer, Speaker(tokenizer, lambda *_: "I win. Solved."), max_turns=3, num_parallel=4
    )
    assert len(groups) == 4 * 2 * 3 and not any(game.success for game in games)
    assert all(game.turn == 3 and game.num_invalid_actions == 6 for game in games)


def test_nothing_earns_more_than_the_solver() -> None:
    rng = random.Random(0)
    for row in rows(60):
        for role in TEAM:
            game = Game.start(row, [role])
            moves = best_moves(game.observation())
            solved = consider(game, moves if role.speaks == "proposal" else call(moves))
            for _ in range(20):
                said = "".join(rng.choice("UDLRX") for _ in range(rng.randint(0, 4)))
                other = consider(game, said if role.speaks == "proposal" else call(said))
                assert (other.team, other.local) <= (solved.team, solved.local)
            copied = consider(game, game.observation())
            assert copied.local == 0.0 and copied.team < solved.team


def test_roles_of_math_answer_and_end_the_game(tokenizer) -> None:
    task = TASKS["math"]
    team = select_roles(["tool_user", "solver"], task.environment)
    row = task.prompt(1, "test")

    def speak(prompts: list[list[int]], role: str) -> list[list[int]]:
        expression = json.dumps({"expression": row["expression"]})
        text = CALL.format("calculator", expression) if role == "tool_user" else f"Answer: {row['answer']}"
        assert ("tool_user: " in tokenizer.decode(prompts[0])) == (role == "solver"), "the result is not seen"
        return [tokenizer.encode(text + "<|im_end|>")]

    _, [game] = play_games(iter([row]), team, tokenizer, speak, max_turns=5, num_parallel=1)
    assert game.success and game.turn == 1 and game.final_text == f"Answer: {row['answer']}"


def test_a_block_that_is_no_group_is_refused(tokenizer) -> None:
    def play(num_rows: int, num_groups: int):
        options = {"max_turns": 9, "num_parallel": 2, "num_candidates": 2, "num_groups": num_groups}
        return play_games(iter(rows(num_rows)), TEAM, tokenizer, Speaker(tokenizer, solver), **options)

    groups, _ = play(num_rows=9, num_groups=6)
    check_groups(groups, 2, 12)
    with pytest.raises(RuntimeError, match="do not fill 14 rows"):
        check_groups(groups, 2, 14)
    groups[3].replies.pop()
    with pytest.raises(RuntimeError, match="has 1 candidates, not 2"):
        check_groups(groups, 2, 12)
    with pytest.raises(ValueError, match="the rows ended after"):
        play(num_rows=1, num_groups=99)
