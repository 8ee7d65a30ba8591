"""The model card of a published run, made from the files beside it."""

import json
from pathlib import Path

import yaml

# In this order at the head of the card; everything else is in metrics.json.
HEADLINES = {
    "num_parameters": "parameters",
    "hidden_size": "hidden size",
    "tokens_seen": "tokens seen",
    "train_seconds": "training seconds",
    "eval_loss": "held-out loss",
    "max_abs_logit_diff": "largest logit difference over the surgery",
    "accuracy_calculator": "calculator accuracy",
    "valid_tool_call_rate_calculator": "valid tool calls",
    "legal_move_rate_tic_tac_toe": "tic-tac-toe: legal moves",
    "loss_rate_tic_tac_toe_perfect": "tic-tac-toe: lost against the perfect opponent",
    "loss_rate_tic_tac_toe_random": "tic-tac-toe: lost against a random opponent",
}


def model_card(folder: Path, name: str) -> str:
    """Markdown with the Hub's front matter, from `run.json`, `metrics.json` and `recipe.yaml` in `folder`.

    Args:
        folder: A published run.
        name: The name to load it by, in the example.
    """
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    recipe = (folder / "recipe.yaml").read_text(encoding="utf-8")
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["adamba", "mamba-2"]}
    rows = [(label, metrics[key]) for key, label in HEADLINES.items() if metrics.get(key) is not None]
    table = [f"| {label} | {_show(value)} |" for label, value in rows]
    inputs = [f"- {kind}: `{path}`" for kind, path in run["input_paths"].items()]
    commit = (run["commit"] or "unknown") + (" with uncommitted changes" if run["uncommitted_changes"] else "")
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name.rsplit('/', 1)[-1]}",
        f"Written by `{run['script']}`; commit {commit}.",
        *(["\n".join(inputs)] if inputs else []),
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```',
        *(["## Measured", "\n".join(["| what | value |", "|---|---|", *table])] if table else []),
        "All figures are in `metrics.json`.",
        f"## Recipe\n\n```yaml\n{recipe}```",
        "Versions: " + ", ".join(f"{package} {version}" for package, version in run["packages"].items()) + ".",
    ]
    return "\n\n".join(lines) + "\n"


def _show(value: float | int | str) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
