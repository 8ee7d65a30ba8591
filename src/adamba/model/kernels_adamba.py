"""Which optional packages of GPU kernels load on this machine; what they compute, plain torch computes as well."""

import functools
import importlib

import torch
from packaging.version import Version

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST = {"mamba_ssm": "2.3"}  # before, its fused kernel stops where in_proj's rows are no multiple of eight numbers


def has_kernels(package: str, tensor: torch.Tensor) -> bool:
    """Whether the kernels of `mamba_ssm` or `causal_conv1d` can take this tensor."""
    return tensor.is_cuda and tensor.dtype in KERNEL_DTYPES and loads(package)


@functools.cache
def loads(package: str) -> bool:
    """Installed, new enough and usable: a package built for another torch is there and fails when it is imported."""
    try:
        module = importlib.import_module(package)
        return package not in OLDEST or Version(module.__version__) >= Version(OLDEST[package])
    except Exception:  # whatever its extension raises
        return False
