"""What the chat is made of and needs no model: the pieces of a streamed turn, the board that a user plays on."""

import random

from adamba.chat_game import GameAgainstUser
from adamba.chat_terminal import TurnText


def test_pieces_are_the_same_however_the_text_is_cut() -> None:
    text = 'Let me <b>think.<think>\nsecret <tool</think>\n\nYes<tool_call>\n{"name": "x"}\n</tool_call> then <'
    expected = [("", "Let me <b>think."), ("dim", "\nsecret <tool"), ("", "\n\nYes then <")]
    rng = random.Random(0)
    for _ in range(50):
        turn, pieces, start = TurnText(), [], 0
        while start < len(text):
            end = start + rng.randint(1, 7)
            pieces += turn.feed(text[start:end])
            start = end
        pieces += turn.rest()
        joined = [(style, "".join(t for s, t in pieces if s == style)) for style in ("", "dim")]
        assert joined == [("", expected[0][1] + expected[2][1]), expected[1]]


def test_the_user_answers_a_cell_in_any_writing() -> None:
    for cell in (5, "5", " 5"):
        game = GameAgainstUser()
        game._start(True, lambda board: 9)
        assert game.play(cell) == "1 2 3 / 4 X 6 / 7 8 O"  # type: ignore[arg-type]
