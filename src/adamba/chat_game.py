"""Tic-tac-toe against the user: the model calls `play` as in training, the user makes the opponent's moves."""

from collections.abc import Callable

from adamba.tasks.tic_tac_toe import PHRASINGS, TicTacToeEnvironment, as_cell
from adamba.tasks.tic_tac_toe_rules import EMPTY, is_over, legal_moves, place, render, winner

AskMove = Callable[[str], int]  # board before the user's move -> the cell the user takes, one that is free


class GameAgainstUser(TicTacToeEnvironment):
    """A game whose opponent is asked instead of computed; what the model reads is the same."""

    def _start(self, model_begins: bool, ask: AskMove) -> str:
        """Start a game and return what it says to the model."""
        board = EMPTY if model_begins else place(EMPTY, ask(EMPTY))
        self.reset(board=board, opponent="user", strength=0.0, game_seed=0)
        self._ask = ask
        return f"{PHRASINGS[0].format(self._mark)}\n{render(board)}"

    def play(self, cell: int) -> str:
        """Take a free cell, 1 to 9, and wait for the user's move."""
        move = as_cell(cell)
        if self._done or move not in legal_moves(self._board):
            return super().play(cell)
        self._legal_moves += 1
        self._board = place(self._board, move)
        if not is_over(self._board):
            self._board = place(self._board, self._ask(self._board))
        text = render(self._board)
        return f"{text}\n{self._result_text()}" if self._done else text

    def _verdict(self) -> str:
        """How the game ended, said to the user."""
        if not is_over(self._board):
            return "The model gave up: you win." if self._done else "The game was not finished."
        won = winner(self._board)
        return "Draw." if won is None else "The model wins." if won == self._mark else "You win."
