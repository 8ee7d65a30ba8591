"""Read what the runs of one family left on disk: metrics, log history, provenance.

Nothing is invented: an absent file leaves its part empty, an unreadable one is an error that names the file.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from adamba.errors import UserError, one_line
from adamba.recipe_values import load_yaml

# The phases of the plan, in order; of phase 6 the online variant counts as the furthest.
# Other output directories of a family follow these.
PHASES: dict[str, str] = {
    "base": "dense base, from scratch",
    "phase0": "surgery: insert Mamba",
    "phase1": "train the Mamba layers only",
    "phase2": "Matryoshka widths and exit gates",
    "phase3a": "surgery: expand",
    "phase3b": "train the expanded model",
    "phase4a": "surgery: expand again",
    "phase4b": "train the expanded model",
    "phase5": "reasoning and tool calls (SFT)",
    "phase6_dpo": "preferences, offline (DPO)",
    "phase6_grpo": "reinforcement learning (GRPO)",
}
SURGERIES = ("phase0", "phase3a", "phase4a")
NOT_RUNS = ("eval", "report")  # recipes that measure runs rather than make one
EVALUATION = "eval"
AGENT_EVALUATION = "eval_agents"  # phases 5 and 6 also play the tasks

Status = Literal["complete", "unmeasured", "missing"]


@dataclass(frozen=True)
class Phase:
    """One run's output directory.

    `status` is "complete" when metrics.json is there, "unmeasured" when only the directory is, else "missing".
    `not_finite` names the metrics that were NaN or infinite; they are left out of `metrics`.
    """

    name: str
    folder: Path
    recipe: Path | None = None
    status: Status = "missing"
    metrics: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    width_names: dict[int, str] = field(default_factory=dict)
    not_finite: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return PHASES.get(self.name, "")

    @property
    def short_name(self) -> str:
        """`phase3b` → `3b`, `phase6_grpo` → `6 GRPO`, others unchanged."""
        match = re.fullmatch(r"phase(\w+?)(?:_(\w+))?", self.name)
        if not match:
            return self.name
        return f"{match[1]} {match[2].upper()}" if match[2] else match[1]

    @property
    def label(self) -> str:
        """`phase 3b`, `phase 6 GRPO`, `base`: how a picture calls it."""
        return f"phase {self.short_name}" if self.short_name != self.name else self.name

    def number(self, key: str) -> float | None:
        """The metric as a float, None when it was not measured."""
        value = self.metrics.get(key)
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    def series(self, prefix: str) -> dict[float, float]:
        """Metrics named `<prefix><number>`, by that number ascending: `series("eval_loss_width_")` → {32.0: 3.1}."""
        pattern = re.compile(re.escape(prefix) + r"(\d+(?:\.\d+)?)")
        found = ((pattern.fullmatch(key), key) for key in self.metrics)
        values = {float(match[1]): self.number(key) for match, key in found if match}
        return {key: values[key] for key in sorted(values) if values[key] is not None}  # type: ignore[misc]

    def width_name(self, width: float) -> str:
        """`think` when the checkpoint's config names this width, else the number itself."""
        return self.width_names.get(int(width), f"{int(width)}")

    @property
    def seconds(self) -> float | None:
        """How long training or surgery took."""
        trained = self.number("train_seconds")
        return self.number("surgery_seconds") if trained is None else trained

    @property
    def command(self) -> str:
        """The command that made this run, as recorded, else put together from script and recipe; may be empty."""
        if recorded := self.run.get("command"):
            return str(recorded)
        script = self.run.get("script")
        return f"python src/{script} {self.recipe or self.folder / 'recipe.yaml'}" if script else ""

    @property
    def evaluation_command(self) -> str:
        """The command that measures this run; empty when its family has no recipe for that."""
        recipe = self.recipe or Path(str(self.run.get("recipe_file") or ""))
        recipes = {path.stem: path for path in recipe.parent.glob("*.yaml")} if recipe.name else {}
        evaluation = evaluation_recipe(recipes, recipe.stem)
        if evaluation is None:
            return ""
        first = evaluation.read_text(encoding="utf-8").partition("\n")[0].split()
        script = next((word for word in first if word.endswith(".py")), "src/run_eval.py")
        return f"python {script} {evaluation} --model_name_or_path {self.folder}"

    @property
    def commit(self) -> str:
        """The short commit the run was made from, `+ changes` when its tree had uncommitted ones; may be empty."""
        commit = str(self.run.get("commit") or "")[:12]
        return f"{commit} + changes" if commit and self.run.get("uncommitted_changes") else commit

    @property
    def hardware(self) -> str:
        """What the run ran on and with, as far as it recorded that; may be empty."""
        parts = [self.run.get("hardware"), self.run.get("platform")]
        if python := self.run.get("python"):
            parts.append(f"Python {python}")
        if torch := (self.run.get("packages") or {}).get("torch"):
            parts.append(f"torch {torch}")
        return ", ".join(str(part) for part in parts if part)


@dataclass(frozen=True)
class Family:
    """All runs of one recipe family, in the order they run."""

    name: str
    source: Path
    phases: tuple[Phase, ...]

    def get(self, name: str) -> Phase | None:
        return next((phase for phase in self.phases if phase.name == name), None)

    def with_metric(self, key: str) -> list[Phase]:
        """The phases that measured `key`."""
        return [phase for phase in self.phases if phase.number(key) is not None]

    def with_series(self, prefix: str) -> list[Phase]:
        """The phases that measured at least one `<prefix><number>`."""
        return [phase for phase in self.phases if phase.series(prefix)]

    @property
    def missing(self) -> list[Phase]:
        return [phase for phase in self.phases if phase.status != "complete"]


def evaluation_recipe(recipes: Mapping[str, Path], name: str) -> Path | None:
    """The recipe that measures a run: its own, or that of its family; agents are played, where the family says how."""
    plays = name.startswith(("phase5", "phase6"))
    choices = [f"{name}_{EVALUATION}", *([AGENT_EVALUATION] if plays else []), EVALUATION]
    return next((recipes[choice] for choice in choices if choice in recipes), None)


def read_family(source: str | Path, checkpoints_dir: str | Path | None = None) -> Family:
    """Read a family from its recipes folder (`recipes/tiny`) or from its checkpoints folder (`checkpoints/tiny`).

    A recipes folder says which phases there should be and where each writes (`output_dir`, whose name is the run's;
    where several have the same, the recipe's name); with a checkpoints folder the plan's phases and whatever else lies
    there are reported. `checkpoints_dir` overrides where the runs are.
    """
    source = Path(source)
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; give a recipes folder (recipes/tiny) or a checkpoints folder")
    recipes = sorted(source.glob("*.yaml"))
    folders: dict[str, tuple[Path, Path | None]] = {}
    if recipes:
        written = {_recipe_output_dir(recipe): recipe for recipe in recipes if recipe.stem not in NOT_RUNS}
        runs = {output_dir: recipe for output_dir, recipe in written.items() if output_dir is not None}
        count = Counter(output_dir.name for output_dir in runs)
        for output_dir, recipe in runs.items():
            if checkpoints_dir and count[output_dir.name] > 1:
                raise UserError(f"checkpoints_dir: several recipes of {source} write a folder {output_dir.name}")
            folder = Path(checkpoints_dir) / output_dir.name if checkpoints_dir else output_dir
            folders[folder.name if count[folder.name] == 1 else recipe.stem] = (folder, recipe)
        parents = {folder.parent.name for folder, _ in folders.values()}
        name = parents.pop() if len(parents) == 1 and parents != {"checkpoints"} else source.name
    else:
        root = Path(checkpoints_dir) if checkpoints_dir else source
        found = (entry for entry in root.iterdir() if entry.is_dir() and (entry / "metrics.json").exists())
        folders = {name: (root / name, None) for name in [*PHASES, *(entry.name for entry in found)]}
        name = root.resolve().name
    order = {phase: index for index, phase in enumerate(PHASES)}
    names = sorted(folders, key=lambda phase: (order.get(phase, len(order)), phase))
    phases = tuple(_read_phase(phase, *folders[phase]) for phase in names)
    if not any(phase.status == "complete" for phase in phases):
        places = sorted({str(phase.folder.parent) for phase in phases}) or [str(source)]
        raise UserError(f"{source}: no finished run with a metrics.json under {', '.join(places)}; run `make demo`")
    return Family(name=name, source=source, phases=phases)


def _recipe_output_dir(recipe: Path) -> Path | None:
    try:
        content = load_yaml(recipe.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{recipe}: not valid YAML ({one_line(error)})") from error
    output_dir = content.get("output_dir") if isinstance(content, dict) else None
    return Path(str(output_dir)) if output_dir else None


def _read_phase(name: str, folder: Path, recipe: Path | None) -> Phase:
    if not folder.is_dir():
        return Phase(name, folder, recipe)
    raw = _read_json(folder / "metrics.json", dict)
    metrics: dict[str, Any] = {}
    not_finite = []
    for key, value in (raw or {}).items():
        if isinstance(value, (dict, list)):
            raise UserError(f"{folder / 'metrics.json'}: key {key}: {type(value).__name__} found, metrics are flat")
        if isinstance(value, float) and not math.isfinite(value):
            not_finite.append(key)
        else:
            metrics[key] = value
    return Phase(
        name=name,
        folder=folder,
        recipe=recipe,
        status="unmeasured" if raw is None else "complete",
        metrics=metrics,
        run=_read_json(folder / "run.json", dict) or {},
        log=_read_log(folder),
        width_names=_read_width_names(folder),
        not_finite=tuple(not_finite),
    )


def _read_log(folder: Path) -> list[dict[str, Any]]:
    path = folder / "log_history.json"
    entries = _read_json(path, list) or []
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise UserError(f"{path}: entry {index}: {type(entry).__name__} found, expected an object")
    return entries


def _read_width_names(folder: Path) -> dict[int, str]:
    levels = (_read_json(folder / "config.json", dict) or {}).get("width_levels")
    if not isinstance(levels, dict):
        return {}
    return {int(width): str(name) for name, width in levels.items() if isinstance(width, int)}


def _read_json(path: Path, expected: type) -> Any:
    """The parsed file, or None when there is none."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); run its phase again to write it anew") from error
    if not isinstance(content, expected):
        kind = "an object" if expected is dict else "a list"
        raise UserError(f"{path}: {type(content).__name__} found, expected {kind}")
    return content
