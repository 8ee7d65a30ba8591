"""Reading a family of runs: what is there is read, what is missing is said, what is broken is named."""

import json
import math
from pathlib import Path

import pytest

from adamba.errors import UserError
from adamba.report import read_family
from adamba.report.reading import PHASES, Phase
from run_report import parse_arguments


def test_phases_come_in_the_order_of_the_plan(family_dir: Path) -> None:
    family = read_family(family_dir)
    names = [phase.name for phase in family.phases]
    assert family.name == "tiny"
    assert names[:4] == ["base", "phase0", "phase1", "phase2"] and names == list(PHASES)
    assert not family.missing


def test_a_recipes_folder_says_which_phases_there_should_be(family_dir: Path, tmp_path: Path) -> None:
    recipes = tmp_path / "recipes" / "tiny"
    recipes.mkdir(parents=True)
    for name in ("base", "phase1", "phase99"):
        (recipes / f"{name}.yaml").write_text(f"output_dir: {family_dir / name}\nlearning_rate: 1e-4\n")
    (recipes / "eval.yaml").write_text("output_dir: somewhere\n")
    (recipes / "report.yaml").write_text("{}\n")
    family = read_family(recipes)
    assert [(phase.name, phase.status) for phase in family.phases] == [
        ("base", "complete"),
        ("phase1", "complete"),
        ("phase99", "missing"),
    ]
    base = family.get("base")
    assert base is not None
    assert base.evaluation_command == (
        f"python src/run_eval.py {recipes / 'eval.yaml'} --model_name_or_path {family_dir / 'base'}"
    )


def test_other_runs_beside_the_plan_follow_it(family_dir: Path) -> None:
    (family_dir / "calculator_agent").mkdir()
    (family_dir / "calculator_agent" / "metrics.json").write_text('{"accuracy_calculator": 0.99}')
    (family_dir / "phase1.trainer").mkdir()
    names = [phase.name for phase in read_family(family_dir).phases]
    assert names[-1] == "calculator_agent" and "phase1.trainer" not in names


def test_series_and_numbers(family_dir: Path) -> None:
    phase = read_family(family_dir).get("phase4b")
    assert phase is not None
    assert list(phase.series("eval_loss_width_")) == [32.0, 64.0, 96.0, 128.0]
    assert list(phase.series("agreement_threshold_")) == [0.8, 0.9, 0.95, 0.99, 1.0]
    assert phase.number("accuracy_calculator") is None
    assert phase.width_name(128.0) == "think" and phase.width_name(48.0) == "48"


def test_a_phase_without_metrics_is_unmeasured_and_one_without_folder_missing(family_dir: Path) -> None:
    (family_dir / "phase2" / "metrics.json").unlink()
    for file in (family_dir / "phase5").iterdir():
        file.unlink()
    (family_dir / "phase5").rmdir()
    missing = {phase.name: phase.status for phase in read_family(family_dir).missing}
    assert missing == {"phase2": "unmeasured", "phase5": "missing"}


def test_not_finite_metrics_are_named_and_left_out(family_dir: Path) -> None:
    path = family_dir / "phase1" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eval_loss": math.nan}))
    phase = read_family(family_dir).get("phase1")
    assert phase is not None
    assert phase.not_finite == ("eval_loss",) and phase.number("eval_loss") is None


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.json", '{"eval_loss": 3.', "not valid JSON"),
        ("metrics.json", "[1, 2]", "list found, expected an object"),
        ("metrics.json", '{"eval_loss": {"a": 1}}', "key eval_loss: dict found, metrics are flat"),
        ("log_history.json", '{"loss": 1}', "dict found, expected a list"),
        ("log_history.json", "[1]", "entry 0: int found, expected an object"),
        ("run.json", "\x00", "not valid JSON"),
    ],
)
def test_a_corrupt_file_is_one_line_that_names_it(family_dir: Path, file: str, content: str, message: str) -> None:
    path = family_dir / "phase2" / file
    path.write_text(content)
    with pytest.raises(UserError) as error:
        read_family(family_dir)
    assert str(path) in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_family(tmp_path / "absent")
    with pytest.raises(UserError, match="no finished run"):
        read_family(tmp_path)
    (tmp_path / "phase0.yaml").write_text("output_dir: [\n")
    with pytest.raises(UserError, match="phase0.yaml: not valid YAML"):
        read_family(tmp_path)


def test_runs_of_several_seeds_are_all_there(tmp_path: Path) -> None:
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for seed in range(3):
        folder = tmp_path / f"runs/seed{seed}/phase5"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(f'{{"seed": {seed}}}')
        (recipes / f"phase5_seed{seed}.yaml").write_text(f"output_dir: {folder}\n")
    phases = read_family(recipes).phases
    assert [(phase.name, phase.metrics["seed"]) for phase in phases] == [(f"phase5_seed{n}", n) for n in range(3)]
    with pytest.raises(UserError, match="checkpoints_dir: several recipes of .* write a folder phase5"):
        read_family(recipes, tmp_path / "runs/seed0")


@pytest.mark.parametrize(
    ("recipe", "command"),
    [
        ("tiny/phase5", "src/run_eval.py recipes/tiny/phase5_eval.yaml"),
        ("tiny/phase6_dpo", "src/run_eval.py recipes/tiny/eval_agents.yaml"),
        ("tiny/phase2", "src/run_eval.py recipes/tiny/eval.yaml"),
        ("games/sudoku_1_sft", "src/run_games.py recipes/games/eval.yaml"),
    ],
)
def test_the_command_that_measured_a_run_is_the_one_that_did(recipe: str, command: str, monkeypatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    phase = Phase(Path(recipe).name, Path("out"), Path(f"recipes/{recipe}.yaml"))
    assert phase.evaluation_command == f"python {command} --model_name_or_path out"


def test_a_folder_that_is_not_there_is_said_to_be_no_folder() -> None:
    assert parse_arguments(["recipes/nope"]).family == "recipes/nope"
    with pytest.raises(UserError, match="recipes/nope: no such folder"):
        read_family("recipes/nope")
    with pytest.raises(UserError, match=r"nope\.yaml: no such recipe"):
        parse_arguments(["recipes/nope.yaml"])
