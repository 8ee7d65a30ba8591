"""
A real base through phases 0 to 2, a few steps of each on one CPU core: SmolLM2-135M-Instruct.

    make setup-smollm2 && python bench/smollm2_phases.py            (about 10 minutes, 6 GiB)

It shows that the recipes run on the real thing and what a step costs, not what training brings: the tokens seen are in
the result. The report draws the same curves as for every family: `python src/run_report.py recipes/smollm2`.
"""

import argparse
import time

from runs import command, metrics_of, write_results

FAMILY, LENGTH = "recipes/smollm2", 128
FOLDERS = {phase: f"checkpoints/smollm2/{phase}" for phase in ("phase0", "phase1", "phase2")}
NO_EPISODES = ("--num_episodes", "calculator=0", "--num_sweep_episodes", "calculator=0")
KEYS = ("tokens_seen", "train_loss", "train_seconds", "num_parameters", "num_trainable_parameters", "eval_loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="of phase 1 and of phase 2")
    options = parser.parse_args()
    started = time.monotonic()
    text = ("--mix", "pydoc_topics=1.0", "--max_length", LENGTH)
    short = ("--max_steps", options.steps, "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 1)
    quiet = ("--use_cpu", "true", "--logging_steps", 1, "--save_strategy", "no", "--disable_tqdm", "true")
    rows = []
    for phase, folder in FOLDERS.items():
        if phase == "phase0":
            command("run_surgery.py", f"{FAMILY}/{phase}.yaml", "--num_check_rows", 2, *text)
        else:
            command("run_pretrain.py", f"{FAMILY}/{phase}.yaml", *text, *short, *quiet)
        few = ("--num_rows", 2, "--batch_size", 2, *NO_EPISODES)
        command("run_eval.py", f"{FAMILY}/eval.yaml", "--model_name_or_path", folder, *text, *few)
        metrics = metrics_of(folder)
        row = {"phase": phase} | {key: metrics[key] for key in KEYS if key in metrics}
        rows.append(
            row | {key: value for key, value in metrics.items() if key.startswith(("max_abs_", "eval_loss_width"))}
        )
    write_results("smollm2_phases", rows, started, steps=options.steps, tokens_a_step=LENGTH)


if __name__ == "__main__":
    main()
