"""A published folder is complete or absent, says what it is, and notices damage."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from adamba.card_pictures import draw_pictures
from adamba.errors import UserError
from adamba.fingerprint import run_fingerprint
from adamba.output_folder import check_output_folder
from adamba.publish import (
    is_complete,
    publish,
    read_metrics,
    read_run,
    record_evaluation,
    trainer_dir,
    update_metrics,
    verify_files,
    why_stale,
)
from adamba.recipe_file import Recipe, read_recipe

RECIPE = Recipe(
    path="recipes/x.yaml",
    script="src/run_x.py",
    code="c0de",
    values={"max_steps": 3, "widths": (1, 2)},
    resolved={"max_steps": 3, "widths": (1, 2), "own": None},
    asked="recipes/x.yaml",
)


class Weights:
    """Stands for a model: one file, or a failure half way."""

    def __init__(self, content: str = "weights", fail: bool = False) -> None:
        self.content, self.fail = content, fail

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "model.safetensors").write_text(self.content)
        if self.fail:
            raise OSError("disk full")
        (Path(folder) / "config.json").write_text("{}")


class FakeTrainer:
    """What `publish` needs of a Trainer."""

    class state:
        log_history = [{"loss": 2.0, "step": 1}, {"loss": float("nan"), "step": 2}]

    class accelerator:
        is_main_process = True
        wait_for_everyone = staticmethod(lambda: None)

    def save_model(self, folder: str) -> None:
        Weights().save_pretrained(Path(folder))
        (Path(folder) / "training_args.bin").write_bytes(b"pickle")


def fingerprint(recipe: Recipe = RECIPE) -> str:
    return run_fingerprint(recipe.code, recipe.values, {})["fingerprint"]


def test_published_folder_says_what_it_is(tmp_path):
    folder = publish(Weights(), None, tmp_path / "runs/x", RECIPE, {"eval_loss": 1.5, "b": 2, "a": float("nan")}, {})
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors",
        "config.json",
        "recipe.yaml",
        "run.json",
        "metrics.json",
        "README.md",
    }
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["x"]
    assert json.loads((folder / "metrics.json").read_text()) == {"a": None, "b": 2, "eval_loss": 1.5}
    assert list(json.loads((folder / "metrics.json").read_text())) == ["a", "b", "eval_loss"]
    assert read_recipe(folder / "recipe.yaml") == {"max_steps": 3, "widths": [1, 2], "own": None}
    run = read_run(folder)
    assert run["script"] == "run_x.py" and run["packages"]["torch"] == torch.__version__
    assert run["files"]["model.safetensors"]["bytes"] == len("weights")
    card = (folder / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"
    assert "| held-out loss | 1.5 |" in card


def test_real_model_round_trip(tmp_path):
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=16,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    folder = publish(model, None, tmp_path / "x", RECIPE, {}, {})
    again = LlamaForCausalLM.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    verify_files(folder)


def test_trainer_leaves_its_log_and_no_pickle(tmp_path):
    folder = publish(FakeTrainer(), None, tmp_path / "x", RECIPE, {}, {})
    assert json.loads((folder / "log_history.json").read_text())[1] == {"loss": None, "step": 2}
    assert not (folder / "training_args.bin").exists()


def test_function_writes_the_weights(tmp_path):
    folder = publish(lambda out: (out / "model.safetensors").write_text("s"), None, tmp_path / "x", RECIPE, {}, {})
    assert (folder / "model.safetensors").read_text() == "s"


def test_failure_leaves_the_previous_checkpoint_untouched(tmp_path):
    folder = publish(Weights("old"), None, tmp_path / "x", RECIPE, {}, {})
    with pytest.raises(OSError, match="disk full"):
        publish(Weights("new", fail=True), None, tmp_path / "x", RECIPE, {}, {})
    assert (folder / "model.safetensors").read_text() == "old" and is_complete(folder, fingerprint())
    publish(Weights("newer"), None, tmp_path / "x", RECIPE, {}, {})  # the left-over .tmp is no obstacle
    assert (folder / "model.safetensors").read_text() == "newer"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_failed_first_run_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="disk full"):
        publish(Weights(fail=True), None, tmp_path / "x", RECIPE, {}, {})
    assert not (tmp_path / "x").exists() and not is_complete(tmp_path / "x", fingerprint())


def test_output_dir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "x").write_text("precious")
    with pytest.raises(UserError, match="output_dir is a file"):
        publish(Weights(), None, tmp_path / "x", RECIPE, {}, {})
    assert (tmp_path / "x").read_text() == "precious"


def test_complete_means_same_run_and_same_bytes(tmp_path):
    folder = publish(Weights(), None, tmp_path / "x", RECIPE, {}, {})
    assert is_complete(folder, fingerprint())
    other = dataclasses.replace(RECIPE, values={"max_steps": 4})
    assert not is_complete(folder, fingerprint(other))
    expected = run_fingerprint(other.code, other.values, {})
    assert why_stale(folder, expected) == "recipe changed since it ran"
    assert why_stale(tmp_path / "absent", expected) == "not run yet"
    expected = run_fingerprint("other", other.values, {"model": "org/x"})
    assert why_stale(folder, expected) == "code and recipe and inputs changed since it ran"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_text("weigh"), "5 bytes, published with 7; truncated or overwritten"),
        (lambda path: path.write_text("wEights"), "the content is not what was published"),
        (lambda path: path.unlink(), "missing, though run.json lists it"),
    ],
)
def test_damaged_weights_are_refused_by_name(tmp_path, damage, message):
    folder = publish(Weights(), None, tmp_path / "x", RECIPE, {}, {})
    damage(folder / "model.safetensors")
    assert not is_complete(folder, fingerprint())
    with pytest.raises(UserError, match=f"model.safetensors: {message}"):
        verify_files(folder)


def test_foreign_folder_is_refused_by_name(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "model.safetensors").write_text("someone else's")
    assert not is_complete(tmp_path / "x", fingerprint())
    with pytest.raises(UserError, match=r"run\.json: no such file; .* is not a finished run"):
        verify_files(tmp_path / "x")
    (tmp_path / "x" / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json: not valid JSON"):
        read_run(tmp_path / "x")
    assert "not valid JSON" in str(why_stale(tmp_path / "x", {"fingerprint": ""}))


def test_metrics_are_merged_into_file_and_card(tmp_path):
    folder = publish(Weights(), None, tmp_path / "x", RECIPE, {"eval_loss": 1.0, "z": 1}, {})
    update_metrics(folder, {"eval_loss": 0.5, "accuracy_calculator": torch.tensor(0.25)}, "eval.yaml")
    assert read_metrics(folder) == {"accuracy_calculator": 0.25, "eval_loss": 0.5, "z": 1}
    assert "| calculator accuracy | 0.25 |" in (folder / "README.md").read_text()
    record_evaluation(folder, "abc")
    assert read_run(folder)["evaluation"] == "abc"
    assert is_complete(folder, fingerprint())
    update_metrics(folder, {"eval_loss": 0.4}, "other.yaml")
    assert "evaluation" not in read_run(folder) and is_complete(folder, fingerprint()), "these are of another one"
    with pytest.raises(TypeError, match="flat: nested is a dict"):
        update_metrics(folder, {"nested": {}}, "eval.yaml")


def test_figures_that_an_evaluation_no_longer_makes_go_and_all_others_stay(tmp_path):
    folder = publish(Weights(), None, tmp_path / "x", RECIPE, {"train_loss": 1.0}, {})
    update_metrics(folder, {"eval_loss": 0.5, "eval_loss_threshold_0.5": 0.7, "accuracy_calculator": 0.2}, "eval.yaml")
    update_metrics(folder, {"success_rate_team": 0.3, "accuracy_calculator": 0.25}, "games.yaml")
    update_metrics(folder, {"eval_loss": 0.4}, "eval.yaml")
    assert read_metrics(folder) == {
        "train_loss": 1.0,
        "eval_loss": 0.4,
        "success_rate_team": 0.3,
        "accuracy_calculator": 0.25,  # of the evaluation that made it last
    }
    update_metrics(folder, {}, "games.yaml")
    assert read_metrics(folder) == {"train_loss": 1.0, "eval_loss": 0.4}
    assert "calculator accuracy" not in (folder / "README.md").read_text()


def test_trainer_folder_is_apart_and_belongs_to_one_run(tmp_path):
    output_dir = tmp_path / "phase1"
    here = trainer_dir(output_dir, RECIPE, {})
    assert here.parent == tmp_path / "phase1.trainer"
    assert trainer_dir(output_dir, dataclasses.replace(RECIPE, values={"max_steps": 4}), {}) != here
    assert (
        trainer_dir(output_dir, dataclasses.replace(RECIPE, values=RECIPE.values | {"logging_steps": 1}), {}) == here
    )


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize("theirs", ["x/thesis", "x/thesis/chapter.tex", "x/.git/HEAD", "x.tmp/a", "x.previous/a"])
@pytest.mark.parametrize("published", [False, True])
def test_a_folder_of_the_users_is_refused_and_never_deleted(tmp_path, theirs, published):
    if published:
        publish(Weights(), None, tmp_path / "x", RECIPE, {}, {})
    (tmp_path / theirs).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / theirs).mkdir() if theirs.endswith("thesis") else (tmp_path / theirs).write_text("years")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="output_dir: .*holds .*move"):
        check_output_folder(tmp_path / "x", {})
    assert tree(tmp_path) == before
    publish(Weights("new"), None, tmp_path / "x", RECIPE, {}, {})  # the second line of defence
    name = Path(theirs).name
    assert len([path for path in tmp_path.rglob(name) if path.is_dir() or path.read_text() == "years"]) == 1
    assert (tmp_path / "x/model.safetensors").read_text() == "new"


def test_what_runs_left_may_be_replaced(tmp_path):
    class Adapter(Weights):
        def save_pretrained(self, folder: Path) -> None:
            super().save_pretrained(folder)
            (Path(folder) / "adapters/planner").mkdir(parents=True)
            for name in ("adapter.safetensors", "README.md"):
                (Path(folder) / "adapters/planner" / name).write_text("a")

    check_output_folder(tmp_path / "x", {})
    (tmp_path / "x").mkdir()
    check_output_folder(tmp_path / "x", {})
    for killed in ("x.tmp", "x.previous"):
        publish(Adapter(), None, tmp_path / killed, RECIPE, {}, {})
    with pytest.raises(OSError, match="disk full"):
        publish(Weights(fail=True), None, tmp_path / "x", RECIPE, {}, {})
    folder = publish(Adapter(), None, tmp_path / "x", RECIPE, {}, {})
    update_metrics(folder, {"eval_loss": 0.5}, "eval.yaml")
    (folder / "games.json").write_text("{}")
    log = [{"step": step, "loss": 3.0, "loss_width_32": 4.0} for step in (1, 2)]
    (folder / "log_history.json").write_text(json.dumps(log))
    assert len(draw_pictures(folder)) == 2, "as a push does"
    check_output_folder(folder, {})
    publish(Adapter(), None, folder, RECIPE, {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("output_dir", [".", "..", "/", "", "sub/..", "a_file", "a_file/x", "b"])
def test_a_folder_that_cannot_be_one_of_its_own(tmp_path, monkeypatch, output_dir):
    monkeypatch.chdir(tmp_path)
    for name in ("a_file", "b.trainer"):
        (tmp_path / name).write_text("precious")
    with pytest.raises(UserError, match="^output_dir: [^\n]*(name|file|written)"):
        check_output_folder(output_dir, {})


@pytest.mark.parametrize("output_dir", ["shelf/model", "shelf", "shelf/model/new", "shelf/../shelf/model/"])
@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("model_name_or_path", {"model_name_or_path": "shelf/model"}),
        ("tokenizer_name_or_path", {"tokenizer_name_or_path": "shelf/model"}),
        ("data_files: pairs", {"data_files": {"pairs": "shelf/model"}}),
        ("task_settings: questions: data_file", {"task_settings": {"questions": {"data_file": "shelf/model"}}}),
    ],
)
def test_what_a_run_reads_is_not_overwritten(tmp_path, monkeypatch, output_dir, key, values):
    monkeypatch.chdir(tmp_path)
    publish(Weights(), None, "shelf/model", RECIPE, {}, {})
    with pytest.raises(UserError, match=f"output_dir: .* overlaps {key}: shelf/model"):
        check_output_folder(output_dir, values)
    check_output_folder("shelf2", values | {"model_name_or_path": "shelf2"})
