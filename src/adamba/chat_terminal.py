"""The chat on the terminal: streaming, tool calls in colour, commands, games."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adamba.chat import Answer, ChatSession
from adamba.chat_game import GameAgainstUser
from adamba.errors import UserError, one_line, printable
from adamba.tasks.tic_tac_toe_rules import legal_moves
from adamba.tools import ToolCall

TAGS = {"<think>": "dim", "</think>": "", "<tool_call>": "hidden", "</tool_call>": ""}
COMMANDS = {
    "/width auto|ghost|…|64": "width of the attention and MLP layers; without a value: full",
    "/exit-threshold 0.9": "leave at the first layer whose gate is surer; 1 never leaves early",
    "/exit-mode propagate|verify": "verify gives the same tokens as full depth",
    "/temperature 0.7": "0 takes the likeliest token",
    "/tools": "the tools the model may call",
    "/reset": "forget the conversation (a new game)",
    "/quit": "leave; so does Ctrl-D. Ctrl-C stops an answer",
}


class NewGame(Exception):
    """The user wants to begin anew in the middle of a game."""


class TurnText:
    """Splits the raw text of a turn into (style, text) pieces; the text of a tool call is left out."""

    def __init__(self) -> None:
        self.buffer, self.style = "", ""

    def feed(self, piece: str) -> Iterator[tuple[str, str]]:
        """The pieces that can be shown now; the beginning of what may become a tag waits."""
        self.buffer += piece
        while True:
            found = [(self.buffer.find(tag), tag) for tag in TAGS if tag in self.buffer]
            position, tag = min(found, default=(len(self.buffer) - self._num_waiting(), ""))
            text, self.buffer = self.buffer[:position], self.buffer[position + len(tag) :]
            if text and self.style != "hidden":
                yield self.style, text
            if not tag:
                return
            self.style = TAGS[tag]

    def rest(self) -> Iterator[tuple[str, str]]:
        """What still waited when the turn ended."""
        if self.buffer and self.style != "hidden":
            yield self.style, self.buffer
        self.buffer, self.style = "", ""

    def _num_waiting(self) -> int:
        lengths = range(min(len(self.buffer), max(map(len, TAGS)) - 1), 0, -1)
        return next((n for n in lengths if any(tag.startswith(self.buffer[-n:]) for tag in TAGS)), 0)


class TerminalView:
    """Shows one answer. Text streams as it comes; a call and its result stand on lines of their own."""

    def __init__(self, console: Console, show_results: bool = True) -> None:
        self.console, self.show_results = console, show_results
        self.turn = TurnText()
        self.at_line_start = True

    def text(self, piece: str) -> None:
        self._show(self.turn.feed(piece))

    def call(self, call: ToolCall) -> None:
        self._end_turn()
        arguments = ", ".join(f"{name}={value!r}" for name, value in call.arguments.items())
        self.console.print(
            f"[cyan]→ {escape(printable(f'{call.name}({arguments})'))}[/]", highlight=False, soft_wrap=True
        )

    def result(self, call: ToolCall, answer: str) -> None:
        if self.show_results or answer.startswith(("error", "Illegal")):
            for line in answer.splitlines():
                self.console.print(f"[green]← {escape(printable(line))}[/]", highlight=False, soft_wrap=True)

    def finish(self, line: str) -> None:
        """End the answer with one dim line."""
        self._end_turn()
        self.console.print(f"[dim]{escape(line)}[/]", highlight=False, soft_wrap=True)

    def _show(self, pieces: Iterator[tuple[str, str]]) -> None:
        for style, text in pieces:
            text = printable(text.lstrip() if self.at_line_start else text)
            if text:
                self.console.print(text, style=style, end="", markup=False, highlight=False, soft_wrap=True)
                self.at_line_start = text.endswith("\n")

    def _end_turn(self) -> None:
        self._show(self.turn.rest())
        if not self.at_line_start:
            self.console.print()
        self.at_line_start = True


class Chat:
    """The loop of questions and answers.

    `read` returns the user's next line, given the words in front of it, and raises `EOFError` at the end.
    """

    def __init__(self, session: ChatSession, console: Console, read: Callable[[str], str]) -> None:
        self.session, self.console, self.read = session, console, read
        self.in_game = False

    def ask(self, text: str, environment: Any = None, show_results: bool = True) -> Answer:
        """One question and its answer, shown while it comes."""
        view = TerminalView(self.console, show_results)
        answer = self.session.answer(text, view, environment)
        view.finish(answer.summary(self.session.width_names))
        return answer

    def talk(self) -> None:
        """Questions until the user leaves."""
        while (line := self._next_line("\n› ")) is not None:
            try:
                self.ask(line)
            except UserError as error:
                self._say_error(error)

    def play(self, num_games: int | None = None) -> None:
        """Games of tic-tac-toe until the user leaves; the model begins every other one."""
        self.in_game = True
        for number in itertools.count() if num_games is None else range(num_games):
            self.session.reset()
            game = GameAgainstUser()
            model_begins = number % 2 == 0
            self.console.print(f"\n[bold]Game {number + 1}.[/] You are {'O' if model_begins else 'X'}.")
            try:
                self.ask(game._start(model_begins, self._ask_move), game, show_results=False)
            except UserError as error:
                self._say_error(error)
            except NewGame:
                continue
            except EOFError:
                return
            self._show_board(game._board)
            self.console.print(f"[bold]{game._verdict()}[/]")

    def _next_line(self, prompt: str) -> str | None:
        """The next line that is no command; None when the user leaves."""
        while True:
            try:
                line = self.read(prompt).strip()
            except EOFError:
                return None
            except KeyboardInterrupt:
                self.console.print("\n[dim]/quit or Ctrl-D leaves[/]", highlight=False)
                continue
            if line in ("/quit", "/exit"):
                return None
            if line.startswith("/"):
                try:
                    self.command(line)
                except UserError as error:
                    self._say_error(error)
            elif line:
                return line

    def command(self, line: str) -> None:
        """Run one of `COMMANDS`.

        Raises:
            UserError: an unknown command, or a value that is not possible.
        """
        name, _, value = line.partition(" ")
        value = value.strip()
        session = self.session
        if name == "/help":
            table = Table(box=None, show_header=False, pad_edge=False)
            for command, meaning in COMMANDS.items():
                table.add_row(f"[cyan]{escape(command)}[/]", meaning)
            self.console.print(table)
            return
        if name == "/tools":
            for schema in session.schemas:
                function = schema["function"]
                arguments = ", ".join(function["parameters"]["properties"])
                summary = one_line(ValueError(function["description"]))
                self.console.print(f"[cyan]{function['name']}({arguments})[/] {escape(summary)}", highlight=False)
            return
        if name == "/reset":
            if self.in_game:
                raise NewGame
            session.reset()
            self.console.print("[dim]a new conversation[/]")
            return
        key = name.removeprefix("/").replace("-", "_")
        if key in ("exit_threshold", "temperature"):
            try:
                session.set_options(**{key: float(value)})
            except ValueError as error:
                raise error if isinstance(error, UserError) else UserError(f"{name}: {value!r} is no number") from None
        elif key in ("width", "exit_mode"):
            session.set_options(**{key: value or None})
        else:
            raise UserError(f"{name}: unknown command; /help lists them")
        self.console.print(f"[dim]{key.replace('_', ' ')} {value or 'full'}[/]", highlight=False)

    def _ask_move(self, board: str) -> int:
        self._show_board(board)
        while True:
            line = self._next_line("your cell › ")
            if line is None:
                raise EOFError
            if line in map(str, legal_moves(board)):
                return int(line)
            self.console.print(
                f"[red]{escape(line)}[/] is not free; free are {', '.join(map(str, legal_moves(board)))}"
            )

    def _show_board(self, board: str) -> None:
        marks = {"X": "[bold blue]X[/]", "O": "[bold yellow]O[/]"}
        cells = [marks.get(mark, f"[dim]{number}[/]") for number, mark in enumerate(board, start=1)]
        for row in range(3):
            self.console.print("  " + " │ ".join(cells[3 * row : 3 * row + 3]), highlight=False)
            if row < 2:
                self.console.print("  ──┼───┼──", style="dim")

    def _say_error(self, error: UserError) -> None:
        self.console.print(f"[red]{escape(one_line(error))}[/]", highlight=False, soft_wrap=True)
