"""The plan as text: a table of phases, the total against the budget, and what else it could be."""

from collections.abc import Sequence
from pathlib import Path

from adamba.errors import UserError
from adamba.gpus import CPU

from .memory import USABLE_FRACTION
from .phases import PlannedPhase, read_plan
from .price import DECODE_SECONDS_PER_LAYER, INSTEAD, Machine, PricedPhase, other_machines, price_plan, rated_tflops

HEADER = ("phase", "tokens", "trained", "of", "GFLOPs/token", "FLOPs", "hours", "dollars", "GiB/GPU", "fits")
SKIPPED = ("phase4a", "phase4b")


def print_plan(family: Path, phases: Sequence[PlannedPhase], machine: Machine, max_usd: float | None) -> None:
    """
    Print everything.

    Raises:
        UserError: the total is above `max_usd`, or a phase does not fit the GPU. The table stands above it.
    """
    priced = price_plan(phases, machine)
    print("\n".join(_columns([HEADER, *(_row(entry) for entry in priced), _total_row(priced)])))
    print()
    print("\n".join([*_assumptions(machine, phases), "", *_variants(family, phases, machine, max_usd)]))
    total = _usd(priced)
    if max_usd is not None:
        print(f"\ntotal {_money(total)} of {_money(max_usd)}: {_money(abs(max_usd - total))} "
              f"{'left' if total <= max_usd else 'over'}")  # fmt: skip
    too_big = [entry.phase.name for entry in priced if not entry.fits]
    if too_big:
        limit = USABLE_FRACTION * machine.gpu.memory_gib
        raise UserError(
            f"--gpu: {', '.join(too_big)} may not fit {limit:.0f} GiB of a {machine.gpu.name}; shard more "
            f"(zero3.yaml), lower per_device_train_batch_size, or take a larger GPU"
        )
    if max_usd is not None and total > max_usd:
        raise UserError(
            f"--max-usd: {_money(max_usd)[1:]} is below the plan's {_money(total)}; lower max_steps, or skip a phase"
        )


def _money(usd: float) -> str:
    """Whole dollars; of a few, two digits: a tiny plan costs less than one."""
    return f"${usd:,.0f}" if usd >= 10 or usd == 0 else f"${usd:.2g}"


def _row(entry: PricedPhase) -> tuple[str, ...]:
    phase = entry.phase
    at_most = "≤ " if phase.script in ("run_grpo.py", "run_dpo.py") else ""
    if phase.is_surgery:
        cells = ("–", "–", _compact(phase.num_parameters), "–", "–")
        return (phase.name, *cells, f"{entry.hours:.3g}", f"{entry.usd:,.0f}", "host", "–")
    return (
        phase.name,
        at_most + _compact(phase.tokens),
        _compact(phase.num_trained),
        _compact(phase.num_parameters),
        f"{phase.flops_per_token / 1e9:.3g}",
        f"{phase.flops:.2e}",
        f"{entry.hours:.3g}",
        f"{entry.usd:,.0f}",
        f"{entry.memory_gib:.3g}",
        "yes" if entry.fits else "NO",
    )


def _total_row(priced: Sequence[PricedPhase]) -> tuple[str, ...]:
    flops = sum(entry.phase.flops for entry in priced)
    return ("total", "", "", "", "", f"{flops:.2e}", f"{_hours(priced):.3g}", f"{_usd(priced):,.0f}", "", "")


def _assumptions(machine: Machine, phases: Sequence[PlannedPhase]) -> list[str]:
    gpu = machine.gpu
    if isinstance(machine.mfu, (int, float)):
        how = f"MFU {machine.mfu:.0%} assumed for all phases; --calibrate measures it where the plan will run"
    else:
        how = "MFU measured here: " + ", ".join(f"{name} {value:.1%}" for name, value in machine.mfu.items())
    speed = "the fastest fp32 matrix product measured" if gpu.name == CPU else "bf16, dense"
    lines = [
        f"{machine.num_gpus} × {gpu.name} of {gpu.tflops:.4g} TFLOP/s ({speed}) and {gpu.memory_gib:.0f} GiB at "
        f"${machine.usd_per_gpu_hour:g} a GPU-hour.",
        f"{how}. What activation checkpointing computes again counts against it.",
        "Tokens: max_steps × rows × max_length of the recipe, at the number of processes it was written for.",
    ]
    in_fp32 = [phase for phase in phases if not (phase.is_surgery or phase.in_halves)]
    if gpu.name != CPU:
        for speed_of in sorted({rated_tflops(phase, gpu) for phase in in_fp32}):
            names = ", ".join(phase.name for phase in in_fp32 if rated_tflops(phase, gpu) == speed_of)
            lines.append(f"In fp32, of {speed_of:.4g} TFLOP/s, as their recipes have no bf16: true: {names}.")
    if any(phase.sequential_tokens for phase in phases):
        lines.append(
            f"GRPO decodes every completion to its longest, {DECODE_SECONDS_PER_LAYER * 1e3:g} ms a layer and token "
            "(assumed), whatever the number of GPUs."
        )
    if any(phase.is_surgery for phase in phases):
        lines.append("Surgery takes what its recipe's second line states. Evaluation (eval.yaml) is not in the total.")
    return lines


def _variants(family: Path, phases: Sequence[PlannedPhase], machine: Machine, max_usd: float | None) -> list[str]:
    header = ("variant", "hours", "dollars", "fits", *(["$/GPU-hour for the budget"] if max_usd is not None else []))
    rows: list[tuple[str, ...]] = [header]

    def add(name: str, priced: Sequence[PricedPhase], count: int) -> None:
        too_big = [entry.phase.name.removeprefix("phase") for entry in priced if not entry.fits]
        fits = "yes" if not too_big else "not " + ", ".join(too_big)
        gpu_hours = _hours(priced) * count
        worth = [f"{max_usd / gpu_hours:.2f}" if gpu_hours else "–"] if max_usd is not None else []
        rows.append((name, f"{_hours(priced):.3g}", f"{_usd(priced):,.0f}", fits, *worth))

    names = {phase.name for phase in phases}
    if names.issuperset(SKIPPED):
        add("without phase 4", price_plan(read_plan(family, SKIPPED), machine), machine.num_gpus)
    for name, other in INSTEAD.items():
        if {name, other} <= names:
            add(f"{name} in place of {other}", price_plan(phases, machine, instead=[name]), machine.num_gpus)
    for variant in other_machines(machine) if isinstance(machine.mfu, (int, float)) else ():
        add(f"{variant.num_gpus} × {variant.gpu.name}, same price", price_plan(phases, variant), variant.num_gpus)
    return _columns(rows)


def _hours(priced: Sequence[PricedPhase]) -> float:
    return sum(entry.hours for entry in priced)


def _usd(priced: Sequence[PricedPhase]) -> float:
    return sum(entry.usd for entry in priced)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _compact(number: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:g}"
