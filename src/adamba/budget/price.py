"""Hours, dollars and memory of a plan on a number of GPUs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adamba.gpus import GPUS, Gpu

from .memory import USABLE_FRACTION, memory_gib
from .phases import PlannedPhase

ASSUMED_MFU = 0.35
# Plain `generate`: a step of decoding waits for its kernels' launches, about 0.1 s through 64 layers (assumed).
DECODE_SECONDS_PER_LAYER = 0.0016
INSTEAD = {"phase6_dpo": "phase6_grpo"}  # offline preferences stand in for GRPO; one of the two is run


@dataclass(frozen=True)
class PricedPhase:
    """One phase on `num_gpus` GPUs."""

    phase: PlannedPhase
    hours: float
    usd: float
    memory_gib: float
    fits: bool


@dataclass(frozen=True)
class Machine:
    """`mfu`: fraction of the GPU's rated speed that training reaches, for all phases or by phase."""

    gpu: Gpu
    num_gpus: int
    usd_per_gpu_hour: float
    mfu: float | Mapping[str, float] = ASSUMED_MFU

    def mfu_of(self, name: str) -> float:
        return self.mfu if isinstance(self.mfu, (int, float)) else self.mfu.get(name, ASSUMED_MFU)


def rated_tflops(phase: PlannedPhase, gpu: Gpu) -> float:
    """In the precision that the phase computes in."""
    if phase.in_halves:
        return gpu.tflops_in("bf16")
    tf32 = phase.values.get("tf32")
    if tf32 is None:
        tf32 = phase.values.get("torch_compile")  # the Trainer switches TF32 on for what it compiles
    return gpu.tflops_in("tf32" if tf32 else "fp32")


def price(phase: PlannedPhase, machine: Machine) -> PricedPhase:
    """Surgery takes the time its recipe states: it runs on the host's CPU while the GPUs are paid for."""
    hours = phase.stated_hours
    if not phase.is_surgery:
        speed = machine.num_gpus * rated_tflops(phase, machine.gpu) * 1e12 * machine.mfu_of(phase.name)
        decoding = phase.sequential_tokens * phase.config.num_hidden_layers * DECODE_SECONDS_PER_LAYER
        hours = (phase.flops / speed + decoding) / 3600
    memory = sum(memory_gib(phase, machine.num_gpus).values())
    fits = memory <= USABLE_FRACTION * machine.gpu.memory_gib
    return PricedPhase(phase, hours, hours * machine.num_gpus * machine.usd_per_gpu_hour, memory, fits)


def price_plan(phases: Sequence[PlannedPhase], machine: Machine, instead: Sequence[str] = ()) -> list[PricedPhase]:
    """Every phase that is run: of two alternatives the first choice, or the one named by `instead`."""
    names = {phase.name for phase in phases}
    left_out = {other if name in instead else name for name, other in INSTEAD.items() if {name, other} <= names}
    return [price(phase, machine) for phase in phases if phase.name not in left_out]


def other_machines(machine: Machine) -> list[Machine]:
    """The same number of every other GPU, at the same price and MFU."""
    return [
        Machine(gpu, machine.num_gpus, machine.usd_per_gpu_hour, machine.mfu)
        for gpu in GPUS.values()
        if gpu.name != machine.gpu.name
    ]
