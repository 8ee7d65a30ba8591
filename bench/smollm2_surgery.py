"""
Is surgery exact on a real model? SmolLM2-135M-Instruct: insert Mamba-2 layers, then expand 576 -> 768 channels.

    make setup-smollm2 && python bench/smollm2_surgery.py            (2 minutes, 5 GiB)

Target: the largest fp32 logit difference at most 1e-4 and every argmax the same, on real text.
"""

import time

from runs import WORK, command, metrics_of, write_results


def main() -> None:
    started = time.monotonic()
    hybrid, wide = WORK / "smollm2_hybrid", WORK / "smollm2_wide"
    text = ("--mix", "pydoc_topics=1.0", "--num_check_rows", 4)
    command("run_surgery.py", "recipes/smollm2/phase0.yaml", *text, "--output_dir", hybrid)
    command(
        "run_surgery.py",
        "recipes/smollm2/phase3a.yaml",
        *("--model_name_or_path", hybrid, "--output_dir", wide, *text),
    )
    rows = []
    for step, checkpoint in (("insert", hybrid), ("expand 576 -> 768", wide)):
        metrics = metrics_of(checkpoint)
        differences = {key: value for key, value in metrics.items() if key.startswith("max_abs_logit_diff")}
        rows.append({"step": step, "num_parameters": metrics["num_parameters"], **differences})
    write_results("smollm2_surgery", rows, started, target="differences at most 1e-4, argmax identical (checked)")


if __name__ == "__main__":
    main()
