"""What the benches share: run the project's own commands, read their metrics, write one JSON of results."""

import json
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from adamba.recipe_file import launcher

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "checkpoints" / "bench"
RESULTS = ROOT / "bench" / "results"
_PRINTED: set[str] = set()


def command(script: str, *arguments: object, before: list[str] | None = None) -> None:
    """
    Run one of `src/run_*.py` in this environment, in as many processes as its recipe says (a step has rows from each)
    or by what stands `before` it instead; its output goes to the terminal.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    is_recipe = bool(arguments) and str(arguments[0]).endswith(".yaml")
    before = before or (launcher(ROOT / str(arguments[0])) if is_recipe else ["python"])
    words = [*before, f"src/{script}", *map(str, arguments)]
    print("$", *words, flush=True)
    subprocess.run([str(Path(sys.executable).with_name(words[0])), *words[1:]], cwd=ROOT, check=True)


def metrics_of(checkpoint: str | Path) -> dict[str, Any]:
    """The metrics.json of a published checkpoint."""
    return json.loads((ROOT / checkpoint / "metrics.json").read_text(encoding="utf-8"))


def evaluate(checkpoint: str | Path, *arguments: object) -> dict[str, Any]:
    """Held-out losses of a checkpoint by `run_eval.py`, on the tiny family's evaluation rows; no episodes."""
    command("run_eval.py", "recipes/tiny/eval.yaml", "--model_name_or_path", checkpoint, *arguments)
    return metrics_of(checkpoint)


def write_results(name: str, rows: list[dict[str, Any]], started: float, **facts: Any) -> None:
    """`bench/results/<name>.json` with hardware, date and versions (of `--quick`: beside the bench's checkpoints)."""
    import torch
    import transformers

    from adamba.publish import describe_hardware

    content = {
        "date": date.today().isoformat(),
        "hardware": f"{describe_hardware()}, {torch.get_num_threads()} threads, {platform.system()}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "cpu_kernels": torch.backends.cpu.get_cpu_capability(),
        "seconds": round(time.monotonic() - started, 1),
        "command": " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        **facts,
        "rows": rows,
    }
    # What `--quick` gives is no measurement, and must not take the place of one.
    folder = WORK if "--quick" in sys.argv else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        values = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
        line = "  ".join(f"{key}={value}" for key, value in values.items())
        if line not in _PRINTED:  # a long bench writes after each part
            print(line)
            _PRINTED.add(line)
    print(f"wrote {path.relative_to(ROOT)}")
