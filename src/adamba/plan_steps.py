"""The phases of a recipe family as steps that can be run, and whether each is already done."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adamba.errors import UserError
from adamba.fingerprint import fingerprint_code, run_fingerprint
from adamba.publish import read_run, record_evaluation, why_stale
from adamba.recipe_file import launch_command, launcher, read_recipe
from adamba.report.reading import AGENT_EVALUATION, EVALUATION, NOT_RUNS, PHASES, evaluation_recipe


@dataclass(frozen=True)
class Step:
    """One command of the plan.

    Attributes:
        name: The phase, for instance `phase3b`.
        recipe: Its recipe file.
        script: The script the recipe's first line names.
        checkpoint: The folder it publishes, or for an evaluation the one it measures.
        evaluation: Whether this step measures the checkpoint rather than makes it.
    """

    name: str
    recipe: Path
    script: Path
    checkpoint: Path
    evaluation: bool = False

    @property
    def command(self) -> list[str]:
        """The program and its arguments."""
        overrides = ["--model_name_or_path", self.checkpoint.as_posix()] if self.evaluation else []
        return [*launcher(self.recipe), str(self.script), str(self.recipe), *overrides]

    def why_run(self) -> str | None:
        """None when a finished run of exactly this step is on disk, otherwise why there is none."""
        if self.evaluation:
            recorded = read_run(self.checkpoint).get("evaluation")
            return None if recorded == self._evaluation_fingerprint() else "not measured yet"
        inputs: Mapping[str, str] = {}
        if (self.checkpoint / "run.json").is_file():
            inputs = read_run(self.checkpoint)["input_paths"]
        expected = run_fingerprint(fingerprint_code(self.script), read_recipe(self.recipe), inputs)
        return why_stale(self.checkpoint, expected)

    def record(self) -> None:
        """Remember a finished evaluation; a phase has written its own `run.json`."""
        if self.evaluation:
            record_evaluation(self.checkpoint, self._evaluation_fingerprint())

    def _evaluation_fingerprint(self) -> str:
        values = read_recipe(self.recipe)
        inputs = {**_data_read(values), "model": self.checkpoint.as_posix()}
        return run_fingerprint(fingerprint_code(self.script), values, inputs)["fingerprint"]


def _data_read(values: Mapping[str, Any]) -> dict[str, str]:
    """Files that a recipe's rows depend on, as `DataArguments.files_read` has it, which takes seconds to load."""
    files = dict(values.get("data_files") or {})
    for name, settings in (values.get("task_settings") or {}).items():
        if isinstance(settings, Mapping) and "data_file" in settings:
            files[f"data_file of {name}"] = settings["data_file"]
    cards = Path(values.get("cards_dir") or "data_cards")
    return files | {f"card of {name}": str(cards / f"{name}.md") for name in values.get("mix") or {}}


def family_steps(family: Path) -> list[Step]:
    """Every run of a family, the plan's phases in their order and then the others by name, each with its evaluation.

    The evaluation of a run is `<name>_eval.yaml`, else for phases 5 and 6 `eval_agents.yaml`, else `eval.yaml`, else
    there is none.

    Raises:
        UserError: when the folder holds no phase's recipe, or a recipe names no script or no output_dir.
    """
    if not family.is_dir():
        raise UserError(f"{family}: no such folder of recipes; the embedded one is recipes/tiny")
    recipes = {path.stem: path for path in sorted(family.glob("*.yaml"))}
    no_runs = {*NOT_RUNS, AGENT_EVALUATION}
    runs = [name for name in recipes if name not in no_runs and not name.endswith(f"_{EVALUATION}")]
    order = {name: place for place, name in enumerate(PHASES)}
    steps = []
    for name in sorted(runs, key=lambda name: order.get(name, len(order))):
        recipe = recipes[name]
        output_dir = read_recipe(recipe).get("output_dir")
        if not isinstance(output_dir, str):
            raise UserError(f"{recipe}: key 'output_dir': required, give it a folder")
        steps.append(Step(name, recipe, script_of(recipe), Path(output_dir)))
        evaluation = evaluation_recipe(recipes, name)
        if evaluation is not None:
            steps.append(Step(name, evaluation, script_of(evaluation), Path(output_dir), evaluation=True))
    if not steps:
        raise UserError(f"{family}: no recipe of any phase here, for instance {family / 'phase0.yaml'}")
    return steps


def script_of(recipe: Path) -> Path:
    """The script named by a recipe's first line."""
    script = Path(next(word for word in launch_command(recipe) if word.endswith(".py")))
    if not script.is_file():
        raise UserError(f"{recipe}: its first line names {script}, which does not exist")
    return script
