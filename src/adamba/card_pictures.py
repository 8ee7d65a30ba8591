"""The pictures of a model card: what the run logged, drawn beside its weights."""

import json
from pathlib import Path

LOSSES = {"loss": "training loss", "eval_loss": "held-out loss", "reward": "reward"}


def draw_pictures(folder: Path) -> list[str]:
    """
    Write `images/<name>.png` of a published folder from its `log_history.json`; returns their paths inside it. Empty
    when nothing was logged (surgery).
    """
    log = folder / "log_history.json"
    entries = json.loads(log.read_text(encoding="utf-8")) if log.is_file() else []
    pictures = []
    for name, keys in (("training", list(LOSSES)), ("widths", _width_keys(entries))):
        curves = {key: _curve(entries, key) for key in keys}
        curves = {LOSSES.get(key, key): curve for key, curve in curves.items() if len(curve) > 1}
        if curves:
            path = folder / "images" / f"{name}.png"
            path.parent.mkdir(exist_ok=True)
            _draw(path, curves)
            pictures.append(path.relative_to(folder).as_posix())
    return pictures


def _width_keys(entries: list[dict]) -> list[str]:
    return sorted({key for entry in entries for key in entry if key == "loss_full" or key.startswith("loss_width_")})


def _curve(entries: list[dict], key: str) -> list[tuple[float, float]]:
    return [(entry["step"], entry[key]) for entry in entries if entry.get(key) is not None and "step" in entry]


def _draw(path: Path, curves: dict[str, list[tuple[float, float]]]) -> None:
    from matplotlib.figure import Figure  # takes a moment to import, and most runs push nothing

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for label, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), label=label.replace("_", " "))
    axes.set_xlabel("optimizer step")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
