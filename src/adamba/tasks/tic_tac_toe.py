"""Tic-tac-toe: a conversation in which each assistant turn calls `play(cell)` until the game is over.

    Tic-tac-toe. You are X.      →  play(5)  →  1 2 O / 4 X 6 / 7 8 9  →  …  →  … You win.  →  I win.
    1 2 3 / 4 5 6 / 7 8 9

The solver makes one and the same best move in a position. Games begin on the empty board or in a random legal
position, against opponents of mixed strength, so every reachable position occurs.

There are few games: a `test` instance has a seed that `train` never has, yet most of its games occur there too (the
data card has the shares). What an agent can do shows in play against the opponents.
"""

import random
from dataclasses import dataclass

from adamba.errors import UserError
from adamba.tasks.task import Message, Row, Split, Task, draw_instance, settings_from, tool_call, tool_schemas
from adamba.tasks.tic_tac_toe_rules import (
    EMPTY,
    Mark,
    is_over,
    legal_moves,
    opponent_move,
    place,
    random_board,
    render,
    result_under_best_play,
    safe_moves,
    solver_move,
    to_move,
    winner,
)

NAME = "tic_tac_toe"
PHRASINGS = ("Tic-tac-toe. You are {}.", "Play tic-tac-toe as {}.", "Let us play tic-tac-toe. You are {}.")
STRENGTHS: dict[str, tuple[float, ...]] = {"perfect": (1.0,), "random": (0.0,), "mixed": (0.25, 0.5, 0.75)}
MAX_ILLEGAL_MOVES = 3
ILLEGAL_MOVE_PENALTY = 0.5  # as a win turned into a draw: among bad games, an illegal move must not look good
MAX_SAFE_MOVE_CREDIT = 0.2  # a lost game scores at most this, whatever its moves
RESULTS: dict[int, tuple[str, str]] = {1: ("You win.", "I win."), 0: ("Draw.", "Draw."), -1: ("You lose.", "I lose.")}


@dataclass(frozen=True)
class TicTacToeSettings:
    """Settings of the tic-tac-toe task.

    Attributes:
        opponent: `perfect`, `random` or `mixed` (a best move with probability 0.25, 0.5 or 0.75), or relative weights
            of these.
        mark: The student's side: `X`, `O` or `any`.
        random_start_fraction: Share of the games that begin in a random legal position instead of the empty board.
        max_start_plies: Largest number of moves already made in such a position (2 to 8).
        max_safe_move_fraction: Such positions have at most this share of moves that do not spoil the result; lower
            gives harder positions.
    """

    opponent: str | dict[str, float] = "any"
    mark: str = "any"
    random_start_fraction: float = 0.5
    max_start_plies: int = 7
    max_safe_move_fraction: float = 1.0

    def __post_init__(self) -> None:
        for name in self.opponent_weights:
            if name not in STRENGTHS:
                raise UserError(
                    f"settings of task {NAME}: opponent is {name!r}; use any, {', '.join(STRENGTHS)} or their weights"
                )
        weights = self.opponent_weights.values()
        if min(weights, default=0) < 0 or not any(weights):
            raise UserError(f"settings of task {NAME}: opponent {self.opponent} has negative weights or only zeros")
        if self.mark not in ("X", "O", "any"):
            raise UserError(f"settings of task {NAME}: mark is {self.mark!r}; use X, O or any")
        if not 2 <= self.max_start_plies <= 8:
            raise UserError(f"settings of task {NAME}: max_start_plies is {self.max_start_plies}; use 2 to 8")

    @property
    def opponent_weights(self) -> dict[str, float]:
        """Relative weight of each opponent."""
        if isinstance(self.opponent, dict):
            return self.opponent
        return dict.fromkeys(STRENGTHS, 1.0) if self.opponent == "any" else {self.opponent: 1.0}


@dataclass(frozen=True)
class Game:
    """One instance: the position in which the student is to move, and the opponent."""

    board: str
    opponent: str
    strength: float
    game_seed: int

    def key(self) -> str:
        """Text that identifies the instance, for its split; with another seed the same game may be in the other."""
        return f"{self.board}/{self.opponent}/{self.strength}/{self.game_seed}"


class TicTacToeEnvironment:
    """One game. The student moves by `play`, the opponent answers at once."""

    def __init__(self) -> None:
        self.reset(board=EMPTY, opponent="perfect", strength=1.0, game_seed=0)

    def reset(self, board: str, opponent: str, strength: float, game_seed: int, **row: object) -> None:
        """Start the game of a `prompt` row; the prompt shows the board, so nothing is added to it."""
        self._board = board
        self._mark: Mark = to_move(board)
        self._strength = strength
        self._game_seed = game_seed
        self._legal_moves = 0
        self._illegal_moves = 0
        self._calls_after_end = 0
        self._safe_moves = 0
        self._guaranteed = -1  # the best result that any of the student's turns could have secured

    def play(self, cell: int) -> str:
        """Take a cell.

        Args:
            cell: 1 to 9, row by row.
        """
        if self._done:
            self._calls_after_end += 1
            return f"The game is over. {self._result_text()}"
        move = as_cell(cell)
        if move not in legal_moves(self._board):
            self._illegal_moves += 1
            if self._done:
                return "Illegal move. You lose."
            return f"Illegal move.\n{render(self._board)}"
        self._guaranteed = max(self._guaranteed, result_under_best_play(self._board))
        self._safe_moves += move in safe_moves(self._board)
        self._legal_moves += 1
        self._board = place(self._board, move)
        if not is_over(self._board):
            self._board = place(self._board, self._reply())
        text = render(self._board)
        return f"{text}\n{self._result_text()}" if self._done else text

    @property
    def _done(self) -> bool:
        return is_over(self._board) or self._illegal_moves >= MAX_ILLEGAL_MOVES

    def _reply(self) -> int:
        """The opponent's cell."""
        return opponent_move(self._board, self._strength, self._game_seed)

    def _result(self) -> int:
        """1, 0 or -1 for the student. A game left unfinished or forfeited is lost."""
        if not is_over(self._board):
            return -1
        won = winner(self._board)
        return 0 if won is None else 1 if won == self._mark else -1

    def _result_text(self) -> str:
        return RESULTS[self._result()][0]

    def _score(self) -> float:
        """1 when the student got at least what best play guaranteed on each of its turns, which the solver always
        does; less for a win turned into a draw, least for a loss; moves that spoiled nothing and illegal moves count.
        """
        if not is_over(self._board):
            return 0.0
        result = self._result()
        if result >= self._guaranteed:
            score = 1.0
        else:
            score = 0.5 * (result + 1) + MAX_SAFE_MOVE_CREDIT * self._safe_moves / self._legal_moves
        return max(0.0, score - ILLEGAL_MOVE_PENALTY * self._illegal_moves)

    def _outcome(self, final_text: str = "") -> dict[str, float]:
        """Score the episode; the game alone decides `score`, the assistant's last text only `well_formed`."""
        result = self._result()
        return {
            "score": self._score(),
            "well_formed": float(is_over(self._board) and final_text.strip() == RESULTS[result][1]),
            "win": float(result == 1),
            "draw": float(result == 0),
            "loss": float(result == -1),
            "finished": float(is_over(self._board)),
            "legal_moves": float(self._legal_moves),
            "illegal_moves": float(self._illegal_moves),
            "valid_calls": float(self._legal_moves),
            "invalid_calls": float(self._illegal_moves + self._calls_after_end),
            "good_calls": float(self._safe_moves),
            "best_calls": float(self._legal_moves if is_over(self._board) else 5),
        }


def prompt(seed: int, split: Split, **settings: object) -> Row:
    """One game to play, from a position that is not lost already, for RL and evaluation."""
    config = settings_from(TicTacToeSettings, NAME, settings)
    return _row(seed, split, config, admit_lost=False)


def example(seed: int, split: Split, **settings: object) -> Row:
    """One game as the solver plays it (from lost positions too: it puts the loss off)."""
    config = settings_from(TicTacToeSettings, NAME, settings)
    row = _row(seed, split, config, admit_lost=True)
    environment = TicTacToeEnvironment()
    environment.reset(**row)
    messages: list[Message] = list(row["prompt"])
    while not environment._done:
        messages += _solver_turn(environment)
    messages.append({"role": "assistant", "content": RESULTS[environment._result()][1]})
    return {"messages": messages, "tools": tool_schemas(TicTacToeEnvironment)}


def preference(seed: int, split: Split, **settings: object) -> Row:
    """A best move against one that is illegal or spoils the result, at a random turn of a solver-played game.

    Illegal ones count for the turns at which no legal move is bad: without pairs of them they would be forgotten.
    """
    config = settings_from(TicTacToeSettings, NAME, settings)
    rng = random.Random(f"{NAME}/preference/{split}/{seed}")
    for attempt in range(1000):
        row = _row(1000 * seed + attempt, split, config, admit_lost=False)
        environment = TicTacToeEnvironment()
        environment.reset(**row)
        messages: list[Message] = list(row["prompt"])
        pairs = []
        while not environment._done:
            board = environment._board
            bad = sorted(set(range(1, 10)) - set(safe_moves(board)))
            if bad:
                chosen, rejected = solver_move(board), rng.choice(bad)
                pairs.append((list(messages), tool_call("play", cell=chosen), tool_call("play", cell=rejected)))
            messages += _solver_turn(environment)
        if pairs:
            history, best, worse = rng.choice(pairs)
            return {
                "prompt": history,
                "chosen": [best],
                "rejected": [worse],
                "tools": tool_schemas(TicTacToeEnvironment),
            }
    raise UserError(f"settings of task {NAME}: no game with a possible mistake in 1000; widen the settings")


def _row(seed: int, split: Split, config: TicTacToeSettings, admit_lost: bool) -> Row:
    game, rng = draw_instance(NAME, seed, split, lambda rng: _draw(rng, config, admit_lost), Game.key)
    text = f"{rng.choice(PHRASINGS).format(to_move(game.board))}\n{render(game.board)}"
    return {
        "prompt": [{"role": "user", "content": text}],
        "environment": NAME,
        "seed": seed,
        "split": split,
        "board": game.board,
        "opponent": game.opponent,
        "strength": game.strength,
        "game_seed": game.game_seed,
    }


def _draw(rng: random.Random, config: TicTacToeSettings, admit_lost: bool) -> Game | None:
    opponent = rng.choices(list(config.opponent_weights), weights=list(config.opponent_weights.values()))[0]
    strength = rng.choice(STRENGTHS[opponent])
    game_seed = rng.getrandbits(32)
    mark = rng.choice("XO") if config.mark == "any" else config.mark
    if rng.random() < config.random_start_fraction:
        plies = [plies for plies in range(1, config.max_start_plies + 1) if (plies % 2 == 0) == (mark == "X")]
        board = random_board(rng, rng.choice(plies))
        if board is None or (result_under_best_play(board) < 0 and not admit_lost):
            return None
        if len(safe_moves(board)) > config.max_safe_move_fraction * len(legal_moves(board)):
            return None
    else:
        board = EMPTY if mark == "X" else place(EMPTY, opponent_move(EMPTY, strength, game_seed))
    return Game(board, opponent, strength, game_seed)


def _solver_turn(environment: TicTacToeEnvironment) -> list[Message]:
    """The solver's move as the student's, and the tool's answer to it."""
    cell = solver_move(environment._board)
    return [tool_call("play", cell=cell), {"role": "tool", "name": "play", "content": environment.play(cell)}]


def as_cell(cell: object) -> int:
    """The cell as a number; 0, which is never legal, for anything else (the text "5" is understood)."""
    if isinstance(cell, str) and cell.strip() in set("123456789"):
        return int(cell)
    return cell if isinstance(cell, int) and not isinstance(cell, bool) else 0


TIC_TAC_TOE = Task(
    name=NAME, environments={NAME: TicTacToeEnvironment}, example=example, prompt=prompt, preference=preference
)
