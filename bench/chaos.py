"""
A training run that is killed again and again: does it end with the weights of an uninterrupted one?

    python bench/chaos.py                  (5 minutes, 1 GiB)
    python bench/chaos.py --quick          (4 kills)

`run_pretrain.py` trains a tiny hybrid (elastic, Muon, a checkpoint every 2 steps, only the newest kept) in a process
of its own, which dies by SIGKILL at a random moment, 20 times; by SIGKILL in the middle of writing a checkpoint, 10
times; and by SIGTERM, SIGINT or SIGUSR1, 6 times. Each time the same command is started again. After every death
the checkpoints are looked at. Target: all survived, 0 checkpoints lost, 0 half-written ones accepted, final weights
bitwise those of the uninterrupted run.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import yaml
from runs import ROOT, WORK, write_results
from safetensors.torch import load_file

from adamba.data import train_tokenizer
from adamba.model import AdambaConfig, AdambaForCausalLM
from adamba.tasks import TASKS
from adamba.training.checkpoints import SEAL, fault

FOLDER = WORK / "chaos"
STEPS, SAVE_EVERY = 40, 2
RECIPE = {
    "mix": {"calculator": 1.0, "tic_tac_toe": 0.5},
    "max_length": 64,
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "learning_rate": 5.0e-3,
    "lr_scheduler_type": "cosine",
    "use_muon": True,
    "elastic": True,
    "save_strategy": "steps",
    "save_steps": SAVE_EVERY,
    "save_total_limit": 1,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
}


def prepare() -> Path:
    """The model to start from and the recipe."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    texts = [json.dumps(TASKS["calculator"].example(seed, "train")) for seed in range(40)]
    tokenizer = train_tokenizer(texts, 384)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    mamba = {"mamba_state_size": 8, "mamba_head_dim": 16, "mamba_chunk_size": 16, "first_exit_layer": 1}
    levels = {"width_levels": {"ghost": 16, "normal": 32, "think": 64}}
    AdambaForCausalLM(AdambaConfig(vocab_size=len(tokenizer), **sizes, **mamba, **levels)).save_pretrained(
        FOLDER / "model"
    )
    tokenizer.save_pretrained(FOLDER / "model")
    path = FOLDER / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"model_name_or_path": str(FOLDER / "model")}), encoding="utf-8")
    return path


def start(recipe: Path, output_dir: Path) -> int:
    """`python src/run_pretrain.py recipe --output_dir ...` in a forked process, its imports done; returns its id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        log = os.open(FOLDER / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = [str(ROOT / "src/run_pretrain.py"), str(recipe), "--output_dir", str(output_dir)]
        import run_pretrain

        run_pretrain.main()
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def checkpoints(output_dir: Path) -> dict[int, str | None]:
    """Step -> what is wrong with that checkpoint."""
    found = output_dir.with_name(f"{output_dir.name}.trainer").glob("*/checkpoint-*")
    return {int(path.name.removeprefix("checkpoint-")): fault(path) for path in found}


def ended(process: int, seconds: float) -> int | None:
    """The exit status of a process that ends within some seconds."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        finished, status = os.waitpid(process, os.WNOHANG)
        if finished:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def writes(process: int, output_dir: Path, count: int) -> int | None:
    """Wait until the process is writing its `count`-th checkpoint from now; its status if it ended."""
    seen: set[Path] = set()
    folder = output_dir.with_name(f"{output_dir.name}.trainer")
    while True:
        code = ended(process, 0.001)
        if code is not None:
            return code
        seen |= {path for path in folder.glob("*/checkpoint-*") if not (path / SEAL).is_file()}
        if len(seen) >= count:
            return None


def batter(recipe: Path, signals: list[signal.Signals], deaths: int, seconds: float, rng: random.Random) -> dict:
    """
    Interrupt runs at random moments until `deaths` have died; a run that gets through is followed by another. With
    `seconds` 0 the moment is in the middle of writing a checkpoint.
    """
    survived = lost = accepted = half_written = runs = 0
    differing: list[str] = []
    expected = load_file(FOLDER / "whole/model.safetensors")
    died = 0
    while died < deaths:
        output_dir = FOLDER / f"{signals[0].name}{seconds:.0f}_{runs}"
        runs += 1
        best = 0
        while True:
            process = start(recipe, output_dir)
            number = rng.choice(signals)
            if died >= deaths:
                code = ended(process, 600)
            elif seconds:
                code = ended(process, rng.uniform(0.0, seconds))
            else:
                code = writes(process, output_dir, rng.randint(1, 4))
            if code is None:
                os.kill(process, number)
                code = ended(process, 600 if number != signal.SIGUSR1 else rng.uniform(0.0, seconds))
                if code is None:  # SIGUSR1 does not end it; now something does
                    os.kill(process, signal.SIGKILL)
                    code = ended(process, 60)
            if code == 0:
                break
            expected_codes = [-number, 128 + number, -signal.SIGKILL]
            if code not in expected_codes:
                raise SystemExit(f"exit code {code} after {number.name}, see {FOLDER / 'log.txt'}")
            died += 1
            state = checkpoints(output_dir)
            whole = [step for step, problem in state.items() if problem is None]
            half_written += len(state) - len(whole)
            # A checkpoint that was accepted must hold every file that a finished one holds, readable to its end.
            for step in whole:
                (path,) = output_dir.with_name(f"{output_dir.name}.trainer").glob(f"*/checkpoint-{step}")
                try:
                    load_file(path / "model.safetensors")
                    for name in ("optimizer.pt", "scheduler.pt"):
                        torch.load(path / name, weights_only=True, map_location="cpu")
                    steps_there = json.loads((path / "trainer_state.json").read_text())["global_step"]
                    accepted += steps_there != step
                except (OSError, RuntimeError, ValueError):
                    accepted += 1
            lost += max(whole, default=0) < best
            best = max([best, *whole])
            survived += 1
            print(f"{number.name}: step {best} of {STEPS}, {len(state) - len(whole)} half-written", flush=True)
        found = load_file(output_dir / "model.safetensors")
        differing = [name for name in expected if not torch.equal(expected[name], found[name])]
        survived -= bool(differing)
        print(f"run {runs} finished, {len(differing)} of {len(expected)} tensors differ", flush=True)
        if differing:
            break
    return {
        "signals": "+".join(number.name for number in signals),
        "moment": "any" if seconds else "while a checkpoint is written",
        "interruptions": died,
        "survived": survived,
        "checkpoints_lost": lost,
        "half_written_seen": half_written,
        "half_written_accepted": accepted,
        "runs_finished": runs,
        "tensors_that_differ": len(differing),
        "tensors": len(expected),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 kills instead of 20")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kills = 4 if options.quick else 20
    began = time.monotonic()
    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT / "src"))
    import run_pretrain  # noqa: F401 (imported once, here, for all forks)

    recipe, rng = prepare(), random.Random(options.seed)
    started = time.monotonic()
    if ended(start(recipe, FOLDER / "whole"), 600) != 0:
        raise SystemExit(f"the uninterrupted run failed, see {FOLDER / 'log.txt'}")
    seconds = time.monotonic() - started
    print(f"uninterrupted: {seconds:.1f} s", flush=True)
    # Long enough to pass some checkpoints in the mean, so that several deaths fall on one run.
    rows = [batter(recipe, [signal.SIGKILL], kills, 0.8 * seconds, rng)]
    rows.append(batter(recipe, [signal.SIGKILL], max(2, kills // 2), 0.0, rng))
    gentle = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    rows.append(batter(recipe, gentle, max(3, kills // 3), 0.8 * seconds, rng))
    write_results(
        "chaos",
        rows,
        began,
        quick=options.quick,
        target="all survived, 0 lost, 0 half-written accepted, 0 tensors differ",
    )
    failed = any(row["survived"] < row["interruptions"] or row["checkpoints_lost"] for row in rows)
    failed |= any(row["half_written_accepted"] or row["tensors_that_differ"] for row in rows)
    shutil.rmtree(FOLDER)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
