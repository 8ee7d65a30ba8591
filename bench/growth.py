"""
Is growing worth it? Phases 3b and 4b against the narrower model trained on the same tokens with the same recipe.

    python bench/growth.py            (after `make demo`; about 6 minutes)

Target: the grown model's held-out loss is the lower one.
"""

import time

from runs import WORK, command, evaluate, metrics_of, write_results

PAIRS = (("phase2", "phase3a", "phase3b"), ("phase3b", "phase4a", "phase4b"))


def main() -> None:
    started = time.monotonic()
    rows = []
    for narrow, surgery, grown in PAIRS:
        stayed = WORK / f"{narrow}_trained_on"
        command(
            "run_pretrain.py",
            f"recipes/tiny/{grown}.yaml",
            *("--model_name_or_path", f"checkpoints/tiny/{narrow}", "--output_dir", stayed),
            *("--old_weight_lr_scale", "1.0", "--disable_tqdm", "true"),
        )
        after = metrics_of(f"checkpoints/tiny/{grown}")
        rows.append(
            {
                "phase": grown,
                "loss_before_surgery": metrics_of(f"checkpoints/tiny/{narrow}")["eval_loss"],
                "loss_after_surgery": metrics_of(f"checkpoints/tiny/{surgery}")["eval_loss"],
                "grown_loss": after["eval_loss"],
                "narrow_loss_same_tokens": evaluate(stayed)["eval_loss"],
                "tokens_seen": after["tokens_seen"],
            }
        )
    write_results("growth", rows, started, target="grown_loss below narrow_loss_same_tokens")


if __name__ == "__main__":
    main()
