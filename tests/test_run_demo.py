"""The demo on a family of three fake phases: order, skipping by content, failure, interruption."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adamba.plan_steps import Step

ROOT = Path(__file__).parent.parent

# A phase: writes what its input and its recipe say. It leaves a mark of each time it ran.
TRAIN = """
import sys
from pathlib import Path
from adamba.errors import user_errors, UserError
from adamba.fingerprint import fingerprint_code
from adamba.publish import publish
from adamba.recipe_file import Recipe, read_recipe

@user_errors()
def main():
    values = read_recipe(sys.argv[1])
    if values.get("fail"):
        raise UserError("phase says no")
    source = values.get("model_name_or_path")
    text = (Path(source) / "model.safetensors").read_text() if source else ""
    recipe = Recipe(sys.argv[1], sys.argv[0], fingerprint_code(sys.argv[0]), values, values, sys.argv[1])
    with open("ran.txt", "a") as file:
        file.write(Path(sys.argv[1]).stem + " ")
    inputs = {"model": source} if source else {}
    publish(lambda out: (out / "model.safetensors").write_text(text + values["text"]), None, values["output_dir"],
            recipe, {"eval_loss": 1.25}, inputs)
main()
"""
EVALUATE = """
import sys
from pathlib import Path
from adamba.publish import update_metrics
checkpoint = sys.argv[sys.argv.index("--model_name_or_path") + 1]
with open("ran.txt", "a") as file:
    file.write(Path(checkpoint).name + "_eval ")
update_metrics(checkpoint, {"accuracy_calculator": 0.5}, sys.argv[1])
"""


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A working directory with src/ (the real demo, fake phases) and recipes/tiny/ of base, phase0 and phase5."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src/adamba").symlink_to(ROOT / "src/adamba")
    (tmp_path / "src/run_demo.py").write_text((ROOT / "src/run_demo.py").read_text())
    (tmp_path / "src/run_train.py").write_text(TRAIN)
    (tmp_path / "src/run_eval.py").write_text(EVALUATE)
    (tmp_path / "src/run_report.py").write_text("import sys\nprint('REPORT', sys.argv[1])\n")
    recipes = tmp_path / "recipes/tiny"
    recipes.mkdir(parents=True)
    write_phase(recipes, "base", "")
    write_phase(recipes, "phase0", "base")
    write_phase(recipes, "phase5", "phase0")
    (recipes / "eval.yaml").write_text("# accelerate launch src/run_eval.py recipes/tiny/eval.yaml\nnum: 1\n")
    return tmp_path


def write_phase(recipes: Path, name: str, source: str, more: str = "") -> None:
    lines = [f"# accelerate launch src/run_train.py recipes/tiny/{name}.yaml", f"text: {name}"]
    lines += [f"model_name_or_path: checkpoints/tiny/{source}"] if source else []
    (recipes / f"{name}.yaml").write_text("\n".join([*lines, f"output_dir: checkpoints/tiny/{name}", more, ""]))


def demo(family: Path, *arguments: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Run the demo; return it and the phases that ran."""
    (family / "ran.txt").write_text("")
    done = subprocess.run(
        [sys.executable, "src/run_demo.py", *(arguments or ("recipes/tiny",))],
        cwd=family,
        env={**os.environ, "PYTHONPATH": "src", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done, (family / "ran.txt").read_text().split()


def test_second_run_does_only_what_is_missing(family):
    done, ran = demo(family)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ran == ["base", "base_eval", "phase0", "phase0_eval", "phase5", "phase5_eval"]
    assert "REPORT recipes/tiny" in done.stdout and "calculator 50.0%" in done.stdout
    assert "phase0: not run yet; running python src/run_train.py recipes/tiny/phase0.yaml" in done.stdout
    assert (family / "checkpoints/tiny/phase5/model.safetensors").read_text() == "basephase0phase5"
    assert (family / "logs/tiny/phase0_eval.log").exists()

    done, ran = demo(family)
    assert (done.returncode, ran) == (0, [])
    assert "phase5: skipped" in done.stdout and "REPORT" in done.stdout

    # a changed recipe: its phase; what follows only if the weights came out different
    recipe = family / "recipes/tiny/phase0.yaml"
    recipe.write_text(recipe.read_text() + "seed: 7\n")
    _, ran = demo(family)
    assert ran == ["phase0", "phase0_eval"]
    recipe.write_text(recipe.read_text().replace("text: phase0", "text: new"))
    done, ran = demo(family)
    assert ran == ["phase0", "phase0_eval", "phase5", "phase5_eval"]
    assert "phase0: recipe changed since it ran" in done.stdout
    assert "phase5: inputs changed since it ran" in done.stdout
    assert (family / "checkpoints/tiny/phase5/model.safetensors").read_text() == "basenewphase5"

    # a damaged checkpoint is made again, and since it comes out the same nothing after it is
    (family / "checkpoints/tiny/base/model.safetensors").write_text("bas")
    done, ran = demo(family)
    assert ran == ["base", "base_eval"]
    assert "truncated or overwritten" in done.stdout

    # changed evaluation code measures again and trains nothing
    script = family / "src/run_eval.py"
    script.write_text(script.read_text() + "# changed\n")
    _, ran = demo(family)
    assert ran == ["base_eval", "phase0_eval", "phase5_eval"]


def test_figures_of_other_evaluations_and_of_other_data_are_measured_again(family):
    recipe = family / "recipes/tiny/eval.yaml"
    recipe.write_text(recipe.read_text() + "data_files: {notes: notes.jsonl}\n")
    (family / "notes.jsonl").write_text("{}\n")
    demo(family)
    assert demo(family)[1] == []
    by_hand = [sys.executable, "src/run_eval.py", "other.yaml", "--model_name_or_path", "checkpoints/tiny/phase0"]
    subprocess.run(by_hand, cwd=family, check=True)
    assert demo(family)[1] == ["phase0_eval"]
    (family / "notes.jsonl").write_text("{}\n{}\n")
    assert demo(family)[1] == ["base_eval", "phase0_eval", "phase5_eval"]


@pytest.mark.parametrize("name", ["notes.jsonl", "asked.json", "cards/notes.md"])
def test_what_an_evaluation_reads_is_in_its_fingerprint(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("notes.jsonl", "asked.json", "cards/notes.md", "measured/run.json", "run_x.py"):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text('{"files": {}}' if path.endswith("run.json") else "")
    keys = "mix: {notes: 1.0, questions: 1.0}\ndata_files: {notes: notes.jsonl}\ncards_dir: cards\n"
    Path("eval.yaml").write_text(keys + "task_settings: {questions: {data_file: asked.json}}\n")
    step = Step("x", Path("eval.yaml"), Path("run_x.py"), Path("measured"), evaluation=True)
    step.record()
    assert step.why_run() is None
    Path(name).write_text("other")
    assert step.why_run() == "not measured yet"


def test_runs_that_are_no_phase_follow_by_name_and_may_have_their_own_evaluation(family):
    recipes = family / "recipes/tiny"
    (recipes / "phase0.yaml").unlink()
    (recipes / "phase5.yaml").unlink()
    write_phase(recipes, "zebra", "")
    write_phase(recipes, "ant", "")
    own = "# accelerate launch src/run_eval.py recipes/tiny/ant_eval.yaml\nnum: 2\n"
    (recipes / "ant_eval.yaml").write_text(own)
    done, ran = demo(family)
    assert done.returncode == 0 and ran == ["base", "base_eval", "ant", "ant_eval", "zebra", "zebra_eval"]
    assert "run_eval.py recipes/tiny/ant_eval.yaml" in done.stdout
    assert "run_eval.py recipes/tiny/eval.yaml --model_name_or_path checkpoints/tiny/zebra" in done.stdout


def test_agent_phases_are_measured_by_eval_agents(family):
    agents = "# accelerate launch src/run_eval.py recipes/tiny/eval_agents.yaml\nnum: 3\n"
    (family / "recipes/tiny/eval_agents.yaml").write_text(agents)
    done, ran = demo(family)
    assert done.returncode == 0 and ran[-2:] == ["phase5", "phase5_eval"], done.stdout
    assert "run_eval.py recipes/tiny/eval_agents.yaml --model_name_or_path checkpoints/tiny/phase5" in done.stdout
    assert "run_eval.py recipes/tiny/eval.yaml --model_name_or_path checkpoints/tiny/phase0" in done.stdout


def test_failure_stops_shows_the_log_and_resumes_there(family):
    write_phase(family / "recipes/tiny", "phase0", "base", more="fail: true")
    done, ran = demo(family)
    assert done.returncode == 2 and ran == ["base", "base_eval"]
    assert "error: phase says no" in done.stdout
    assert "src/run_train.py recipes/tiny/phase0.yaml" in done.stdout.splitlines()[-1]
    assert "REPORT" not in done.stdout and not (family / "checkpoints/tiny/phase0").exists()
    write_phase(family / "recipes/tiny", "phase0", "base")
    done, ran = demo(family)
    assert done.returncode == 0 and ran == ["phase0", "phase0_eval", "phase5", "phase5_eval"]


def test_until_stops_early(family):
    done, ran = demo(family, "recipes/tiny", "--until", "base")
    assert done.returncode == 0 and ran == ["base", "base_eval"]
    metrics = json.loads((family / "checkpoints/tiny/base/metrics.json").read_text())
    assert metrics == {"accuracy_calculator": 0.5, "eval_loss": 1.25}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipes/absent"], "recipes/absent: no such folder of recipes"),
        (["src"], "src: no recipe of any phase here"),
        (["recipes/tiny", "--until", "phase9"], "--until phase9: no such phase in recipes/tiny; it has base, phase0"),
    ],
)
def test_bad_arguments_get_one_line(family, arguments, message):
    done, ran = demo(family, *arguments)
    assert done.returncode == 2 and ran == []
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.splitlines()) == 1


def test_recipe_without_output_dir_or_script_is_named(family):
    recipe = family / "recipes/tiny/phase0.yaml"
    text = recipe.read_text()
    recipe.write_text(text.replace("output_dir", "outputdir"))
    assert "phase0.yaml: key 'output_dir': required" in demo(family)[0].stderr
    recipe.write_text(text.replace("run_train", "run_trane"))
    assert "phase0.yaml: its first line names src/run_trane.py, which does not exist" in demo(family)[0].stderr


def test_a_recipe_that_names_an_accelerate_config_runs_in_its_processes(family):
    config = (ROOT / "accelerate_configs/ddp_cpu.yaml").read_text()
    (family / "two.yaml").write_text(config)
    (family / "recipes/tiny/phase5.yaml").write_text(
        "# accelerate launch --config_file two.yaml src/run_rank.py recipes/tiny/phase5.yaml\n"
        "text: x\nmodel_name_or_path: checkpoints/tiny/phase0\noutput_dir: checkpoints/tiny/phase5\n"
    )
    mark = 'import os; print(f\'rank {os.environ["RANK"]} of {os.environ["WORLD_SIZE"]}\', flush=True)\n'
    only_first = "if os.environ['RANK'] != '0': raise SystemExit\n"
    (family / "src/run_rank.py").write_text(mark + only_first + TRAIN)
    done, ran = demo(family)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "running accelerate launch --quiet --config_file two.yaml src/run_rank.py" in done.stdout
    assert ran[-2:] == ["phase5", "phase5_eval"]
    log = (family / "logs/tiny/phase5.log").read_text()
    assert "rank 0 of 2" in log and "rank 1 of 2" in log
