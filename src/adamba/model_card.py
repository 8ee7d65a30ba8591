"""The model card of a published run, made from the files beside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from adamba.errors import UserError

if TYPE_CHECKING:
    from adamba.data.cards import Card

# In this order at the head of the card; everything else is in metrics.json.
HEADLINES = {
    "num_parameters": "parameters",
    "hidden_size": "hidden size",
    "tokens_seen": "tokens seen",
    "train_seconds": "training seconds",
    "cost_usd": "cost in dollars",
    "eval_loss": "held-out loss",
    "max_abs_logit_diff": "largest logit difference over the surgery",
    "accuracy_calculator": "calculator accuracy",
    "valid_tool_call_rate_calculator": "valid tool calls",
    "legal_move_rate_tic_tac_toe": "tic-tac-toe: legal moves",
    "loss_rate_tic_tac_toe_perfect": "tic-tac-toe: lost against the perfect opponent",
    "loss_rate_tic_tac_toe_random": "tic-tac-toe: lost against a random opponent",
}
# Prefixes of metrics.json that are results of an evaluation; what follows may name the data they were measured on.
RESULTS = ("eval_loss", "accuracy_", "valid_tool_call_rate_", "legal_move_rate_", "loss_rate_")
VARIANTS = ("_width_", "_threshold_", "_layer_", "_low", "_high")  # each width and threshold: metrics.json has them


def model_card(folder: Path, name: str, revision: str | None = None) -> str:
    """Markdown with the Hub's front matter, from what stands in `folder`: `run.json`, `metrics.json`, `recipe.yaml`
    and pictures in `images`.

    Args:
        folder: A published run.
        name: The name to load it by, in the example.
        revision: The branch it is on there.
    """
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    recipe = (folder / "recipe.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(recipe) or {}
    cards = used_cards(values)
    rows = [(label, metrics[key]) for key, label in HEADLINES.items() if metrics.get(key) is not None]
    table = [f"| {label} | {_show(value)} |" for label, value in rows]
    inputs = [f"- {kind}: `{path}`" for kind, path in run["input_paths"].items()]
    commit = (run["commit"] or "unknown") + (" with uncommitted changes" if run["uncommitted_changes"] else "")
    where = f'"{name}"' + (f', revision="{revision}"' if revision else "")
    pictures = sorted(path.relative_to(folder).as_posix() for path in (folder / "images").glob("*.png"))
    front = front_matter(name, run, metrics, values, cards)
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {revision or name.rsplit('/', 1)[-1]}",
        f"Written by `{run['script']}`; commit {commit}.",
        *(["\n".join(inputs)] if inputs else []),
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({where}, trust_remote_code=True)\n"
        f"tokenizer = AutoTokenizer.from_pretrained({where}, trust_remote_code=True)\n```",
        *(["## Measured", "\n".join(["| what | value |", "|---|---|", *table])] if table else []),
        "All figures are in `metrics.json`.",
        *[f"![{Path(picture).stem}]({picture})" for picture in pictures],
        *(["## Data", "\n".join(_data_rows(cards, values["mix"]))] if cards else []),
        f"## Recipe\n\n```yaml\n{recipe}```",
        "Versions: " + ", ".join(f"{package} {version}" for package, version in run["packages"].items()) + ".",
    ]
    return "\n\n".join(lines) + "\n"


def front_matter(
    name: str,
    run: Mapping[str, Any],
    metrics: Mapping[str, Any],
    values: Mapping[str, Any],
    cards: "Mapping[str, Card]",
) -> dict[str, Any]:
    """The card's metadata: the Hub's own keys with the results as `model-index`, and the resolved recipe."""
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=source or "mix",
            dataset_name=cards[source].pretty_name if source and source in cards else (source or "the recipe's mix"),
            dataset_split="test",
            metric_type=key,
            metric_name=HEADLINES.get(key, key.replace("_", " ")),
            metric_value=value,
        )
        for key, value in sorted(metrics.items())
        if key.startswith(RESULTS) and isinstance(value, (int, float)) and not any(part in key for part in VARIANTS)
        for source in [_measured_on(key, values.get("mix") or {})]
    ]
    data = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["adamba", "mamba-2"],
        datasets=[card.path for card in cards.values() if card.path] or None,
        eval_results=results or None,
    )
    return data.to_dict() | {"adamba": {"script": run["script"], "commit": run["commit"], "recipe": dict(values)}}


def used_cards(values: Mapping[str, Any]) -> "dict[str, Card]":
    """The data cards of a recipe's mix, as far as they can still be read."""
    from adamba.data.cards import load_cards  # its package loads datasets; who only plans or lists runs does not wait

    mix = values.get("mix")
    try:
        known = load_cards(values.get("cards_dir") or "data_cards") if isinstance(mix, dict) else {}
    except UserError:
        known = {}
    return {source: known[source] for source in mix or {} if source in known}


def _measured_on(key: str, mix: Mapping[str, float]) -> str | None:
    """The source that a metric's name holds, for instance `calculator` of `accuracy_calculator`."""
    found = [source for source in mix if f"_{source}_" in f"{key}_"]
    return max(found, key=len, default=None)


def _data_rows(cards: "Mapping[str, Card]", mix: Mapping[str, float]) -> list[str]:
    total = sum(mix.values())
    rows = ["| data | share | licence | where from |", "|---|---|---|---|"]
    for source, card in cards.items():
        place = f"[{card.path}](https://huggingface.co/datasets/{card.path})" if card.path else f"`{card.loader}`"
        rows.append(f"| {card.pretty_name} (`{source}`) | {mix[source] / total:.1%} | {card.license} | {place} |")
    return rows


def _show(value: float | int | str) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
