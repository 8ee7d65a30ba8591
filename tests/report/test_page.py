"""The report: numbers reach the page and report.json, missing parts are said to be missing."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

import run_report
from adamba.report import print_report, read_family, write_report
from adamba.report.page import compact, duration
from adamba.report.reading import PHASES

REPOSITORY = Path(__file__).parents[2]
PICTURES = (
    "loss_per_phase",
    "loss_per_source",
    "loss_per_width",
    "loss_against_compute",
    "accuracy_against_compute",
    "exit_tradeoff",
    "gate_reliability",
    "agent_scores",
    "reward_per_step",
)


class Tags(HTMLParser):
    """Checks that tags nest, and collects the text and what the page would load from elsewhere."""

    VOID = frozenset(("meta", "br", "img", "source", "link", "hr"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def full_report(tmp_path_factory: pytest.TempPathFactory, write_family) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("full")
    checkpoints = write_family(root / "checkpoints" / "tiny")
    return checkpoints, write_report(read_family(checkpoints), root / "reports" / "tiny")


def test_all_pictures_are_drawn_and_the_page_needs_no_other_file(full_report: tuple[Path, Path]) -> None:
    _, page = full_report
    for name in PICTURES:
        assert (page.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    tags = Tags()
    tags.feed(page.read_text(encoding="utf-8"))
    assert tags.open == []
    images = [link for link in tags.links if link.startswith("data:image/png;base64,")]
    assert len(images) == 2 * len(PICTURES)
    assert [link for link in tags.links if link not in images] == ["report.json"]


def test_report_json_holds_every_metric(full_report: tuple[Path, Path]) -> None:
    checkpoints, page = full_report
    report = json.loads(page.with_suffix(".json").read_text())
    assert list(report["phases"])[0] == "base" and report["missing"] == []
    for name, phase in report["phases"].items():
        assert phase["metrics"] == json.loads((checkpoints / name / "metrics.json").read_text())
    assert report["commits"] == ["0123abcd0123"] and report["pictures"]["agent_scores"] == "agent_scores.png"
    assert report["surgeries"][0]["is_exact"] is True
    assert report["best_saving"]["threshold"] == 0.9


def test_numbers_reach_the_page(full_report: tuple[Path, Path]) -> None:
    _, page = full_report
    tags = Tags()
    tags.feed(page.read_text(encoding="utf-8"))
    text = re.sub(r"\s+", " ", " ".join(tags.words))
    number = len(PHASES)
    for expected in (f"{number} of the {number} phases", "15.5 M training tokens", "0123abcd0123", "expand 96→128",
                     "2.3600", "98.4 %", "run_grpo.py", "gate_bin_9_count", "Linux-test", "torch 2.13.0"):  # fmt: skip
        assert expected in text, expected


def test_missing_parts_are_said_to_be_missing(family_dir: Path, tmp_path: Path) -> None:
    for name in list(PHASES)[list(PHASES).index("phase2") :]:
        shutil.rmtree(family_dir / name)
    (family_dir / "phase1" / "log_history.json").unlink()
    page = write_report(read_family(family_dir), tmp_path / "out")
    report = json.loads(page.with_suffix(".json").read_text())
    assert report["missing"][0] == "phase2" and report["phases"]["phase5"]["metrics"] == {}
    assert report["pictures"]["agent_scores"] is None and report["pictures"]["loss_per_phase"] == "loss_per_phase.png"
    text = page.read_text(encoding="utf-8")
    assert "Not measured yet. Needs gate_bin_*" in text and "missing: no run in" in text
    assert "98.4" not in text


def test_a_stale_picture_of_an_earlier_report_is_removed(family_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "reward_per_step.png").write_bytes(b"old")
    shutil.rmtree(family_dir / "phase6_grpo")
    write_report(read_family(family_dir), tmp_path / "out")
    assert not (tmp_path / "out" / "reward_per_step.png").exists()


def test_one_measurement_is_enough_for_a_page(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "metrics.json").write_text('{"eval_loss": 3.25, "exit_fraction_threshold_0.9": 0.3}')
    page = write_report(read_family(tmp_path), tmp_path / "out")
    assert "3.250" in page.read_text(encoding="utf-8")


def test_text_from_a_run_is_escaped(family_dir: Path, tmp_path: Path) -> None:
    path = family_dir / "base" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"note": "<script>alert(1)</script>"}))
    assert "<script>" not in write_report(read_family(family_dir), tmp_path / "out").read_text(encoding="utf-8")


def test_terminal_table(family_dir: Path) -> None:
    shutil.rmtree(family_dir / "phase6_dpo")
    output = StringIO()
    print_report(read_family(family_dir), Console(file=output, width=100))
    lines = output.getvalue().splitlines()
    assert next(line for line in lines if line.startswith("phase6_dpo")).split() == ["phase6_dpo", "missing"]
    row = next(line for line in lines if line.startswith("phase5")).replace("\u00a0", " ").split()
    assert row == ["phase5", "128", "2.5", "M", "75", "s", "0.370", "98.4", "%", "99.6", "%", "14.0", "%"]


@pytest.mark.smoke
def test_the_command_writes_the_report_of_a_recipe(family_dir: Path, tmp_path: Path) -> None:
    recipes = tmp_path / "recipes" / "tiny"
    recipes.mkdir(parents=True)
    (recipes / "base.yaml").write_text("output_dir: checkpoints/tiny/base\n")
    (recipes / "report.yaml").write_text("# accelerate launch src/run_report.py recipes/tiny/report.yaml\n{}\n")
    command = [sys.executable, str(REPOSITORY / "src" / "run_report.py"), "recipes/tiny/report.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "reports" / "tiny" / "report.html").is_file() and "base" in done.stdout


def test_a_corrupt_metrics_file_is_one_error_line_and_the_old_report_stays(
    family_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("old")
    (family_dir / "phase3b" / "metrics.json").write_text('{"eval_loss": ')
    monkeypatch.setattr(sys, "argv", ["run_report.py", str(family_dir), "--output_dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        run_report.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1 and str(family_dir / "phase3b" / "metrics.json") in error
    assert (tmp_path / "out" / "report.json").read_text() == "old"


def test_units() -> None:
    assert [compact(value) for value in (None, 950, 1_350_000, 4e9)] == ["–", "950", "1.35 M", "4 G"]
    assert compact(2 * 1024**3, "B") == "2 GiB"
    assert [duration(s) for s in (None, 75.2, 245, 7800)] == ["–", "75 s", "4 min 05 s", "2 h 10 min"]


def test_numbers_that_were_not_finite_cost_no_page(tmp_path: Path) -> None:
    """Published logs hold them as null."""
    logs = {
        "phase2": [{"step": step, "loss": 2.0, "loss_pydoc_topics": None} for step in (1, 2)],
        "phase6_grpo": [{"step": step, "reward": None if step == 2 else 0.5} for step in (1, 2, 3)],
    }
    for name, log in logs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text("{}")
        (tmp_path / name / "log_history.json").write_text(json.dumps(log))
    write_report(read_family(tmp_path), tmp_path / "out")
    drawn = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert drawn == {"loss_per_phase", "reward_per_step"}
