"""What accelerators are rated at, from their vendors' data sheets."""

import difflib
from dataclasses import dataclass

from adamba.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """`tflops`: bf16 with fp32 accumulation, dense (no sparsity), in 1e12 FLOPs a second; `fp32_tflops`: fp32 without
    TF32, as torch computes it unless told otherwise. `memory_gib`: usable GiB."""

    name: str
    tflops: float
    fp32_tflops: float
    memory_gib: float

    def tflops_in(self, precision: str) -> float:
        """`bf16` (fp16 too), `tf32`, at half of bf16's speed on all GPUs here, or `fp32`."""
        tf32 = max(self.fp32_tflops, self.tflops / 2)
        return {"bf16": self.tflops, "tf32": tf32, "fp32": self.fp32_tflops}[precision]


def _gpu(name: str, tflops: float, fp32_tflops: float, memory_gb: float) -> Gpu:
    return Gpu(name, tflops, fp32_tflops, memory_gb * 1e9 / 2**30)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100", 312, 19.5, 80),
        _gpu("h100", 989, 67, 80),
        _gpu("h100pcie", 756, 51, 80),
        _gpu("h200", 989, 67, 141),
        _gpu("b200", 2250, 75, 180),
        _gpu("mi300x", 1307, 163, 192),
        _gpu("l40s", 362, 91.6, 48),
        _gpu("rtx4090", 165, 82.6, 24),
    )
}
CPU = "cpu"  # its speed is measured, `--calibrate`


def find_gpu(name: str) -> Gpu:
    """
    Raises:
        UserError: naming the nearest known one.
    """
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    close = difflib.get_close_matches(name.lower(), [*GPUS, CPU], n=1)
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join([*GPUS, CPU])}"
    raise UserError(f"--gpu: {name!r} is unknown; {hint}")


def gpu_named(device: str) -> Gpu | None:
    """By what a driver calls it, for instance `NVIDIA H100 PCIe`; None if it is not in the table."""
    named = [gpu for gpu in GPUS.values() if gpu.name in device.lower().replace(" ", "")]
    return max(named, key=lambda gpu: len(gpu.name), default=None)


def rated_flops_per_second(precision: str = "bf16") -> float:
    """Of this machine's first GPU, by its name; 0 without a GPU, or with one that is not in the table."""
    import torch

    gpu = gpu_named(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return gpu.tflops_in(precision) * 1e12 if gpu is not None else 0.0
