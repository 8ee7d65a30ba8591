"""
Does one elastic model pay for being many? Each sub-width of phase 2 against a model of that width trained alone.

    python bench/widths.py            (after `make demo`; about 10 minutes)

The twin is the same phase-1 checkpoint, sorted by importance and sliced to the width, trained without elasticity on as
many tokens, with the same recipe, data and seed. Target: the elastic loss at most 5 % above the twin's.
"""

import time

from runs import WORK, command, evaluate, metrics_of, write_results

from adamba.recipe_file import read_recipe

TINY = "recipes/tiny"
WIDTHS = (16, 32, 48)


def main() -> None:
    started = time.monotonic()
    mix = ",".join(f"{name}={weight}" for name, weight in read_recipe(f"{TINY}/phase2.yaml")["mix"].items())
    sorted_base = WORK / "phase1_sorted"
    surgery = ("run_surgery.py", "--mix", mix, "--operation")
    command(*surgery, "sort", "--model_name_or_path", "checkpoints/tiny/phase1", "--output_dir", sorted_base)
    elastic = metrics_of("checkpoints/tiny/phase2")
    rows = []
    for width in WIDTHS:
        sliced, twin = WORK / f"width{width}_start", WORK / f"width{width}"
        command(*surgery, "slice", "--width", width, "--model_name_or_path", sorted_base, "--output_dir", sliced)
        alone = ("--elastic", "false", "--sort_by_importance", "false", "--disable_tqdm", "true")
        command(
            "run_pretrain.py",
            f"{TINY}/phase2.yaml",
            *("--model_name_or_path", sliced, "--output_dir", twin),
            *alone,
        )
        twin_loss = evaluate(twin)["eval_loss"]
        loss = elastic[f"eval_loss_width_{width}"]
        rows.append({"width": width, "elastic_loss": loss, "alone_loss": twin_loss, "ratio": loss / twin_loss})
    write_results("widths", rows, started, target="ratio at most 1.05", tokens_seen=elastic["tokens_seen"])


if __name__ == "__main__":
    main()
