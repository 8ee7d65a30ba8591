"""The table of games and the games themselves, as the evaluations left them."""

import json
from pathlib import Path

import pytest

from adamba.errors import UserError
from adamba.report import read_family, write_report
from adamba.report.games import ARMS, game_rows, transcripts

FIGURES = {
    "success_rate": 0.5,
    "success_low": 0.4,
    "success_high": 0.6,
    "mean_turns": 3.25,
    "invalid_action_rate": 0.1,
}


def write_run(folder: Path, ways: list[str], **metrics) -> None:
    folder.mkdir(parents=True)
    figures = {f"{key}_{way}": value for way in ways for key, value in FIGURES.items()}
    figures |= {f"tokens_per_episode_{way}": 71.0 for way in ways}
    (folder / "metrics.json").write_text(json.dumps({"game": "plan_path"} | figures | metrics))
    games = [{"way": way, "won": won, "lines": ["@.G", "actor: R<b>"]} for way in ways for won in (True, False)]
    (folder / "games.json").write_text(json.dumps({"task": "plan_path", "transcripts": games}))


@pytest.fixture
def family(tmp_path: Path) -> Path:
    root = tmp_path / "games"
    write_run(root / "plan_path_1_sft", ["single", "team"])
    write_run(root / "plan_path_2_grpo", ["single"], num_generated_tokens=150_000)
    write_run(root / "plan_path_3_shared", ["team"], num_generated_tokens=150_000)
    write_run(root / "plan_path_4_per_role", ["team", "team_swapped"], num_generated_tokens=150_000)
    return root


def test_every_arm_has_a_row_in_the_order_of_the_story(family: Path) -> None:
    rows = game_rows(read_family(family))
    assert [row["who"] for row in rows] == list(ARMS.values())
    assert rows[1]["RL tokens"] == "150,000" and rows[0]["RL tokens"] == "–"
    assert rows[0]["95 % interval"] == "40.0\u00a0% – 60.0\u00a0%" and rows[0]["turns"] == "3.2"


def test_page_shows_the_table_and_the_boards(family: Path, tmp_path: Path) -> None:
    page = write_report(read_family(family), tmp_path / "report").read_text()
    assert "Games: one agent and a team" in page and page.count("<pre>@.G</pre>") == 2 * len(ARMS)
    assert "actor: R&lt;b&gt;" in page and "✗ lost" in page
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    assert len(content["games"]) == len(ARMS)


def test_a_run_that_is_not_there_or_not_measured_has_no_row(family: Path) -> None:
    (family / "plan_path_4_per_role" / "metrics.json").write_text("{}")
    rows = game_rows(read_family(family))
    assert len(rows) == 4 and not any("policy a role" in row["who"] for row in rows)


def test_a_broken_games_file_is_named(family: Path) -> None:
    (family / "plan_path_2_grpo" / "games.json").write_text("{")
    with pytest.raises(UserError, match=r"plan_path_2_grpo/games.json: not valid JSON"):
        transcripts(read_family(family))
