"""What a run reads, as its record and its checkpoints know it: a changed file is another run."""

from pathlib import Path

from adamba.data.arguments import DataArguments


def test_local_files_and_the_cards_that_say_how_to_read_them_are_inputs(tmp_path: Path) -> None:
    for name in ("fineweb", "calculator"):
        (tmp_path / f"{name}.md").write_text("a card")
    mine = {"fineweb": "texts", "questions": "quiz.jsonl", "openorca": "not/in/the/mix"}
    mix = {"fineweb": 1.0, "calculator": 1.0, "questions": 0.5}
    arguments = DataArguments(mix=mix, data_files=mine, cards_dir=str(tmp_path))
    card = str(tmp_path / "fineweb.md")  # that of a task describes it and decides nothing
    assert arguments.files_read() == {"fineweb": "texts", "questions": "quiz.jsonl", "card of fineweb": card}
