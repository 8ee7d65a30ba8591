"""Which optional packages of GPU kernels load on this machine; what they compute, plain torch computes as well."""

import functools
import importlib

import torch


def has_kernels(package: str, tensor: torch.Tensor) -> bool:
    """Whether the kernels of `mamba_ssm` or `causal_conv1d` can take this tensor."""
    return tensor.is_cuda and loads(package)


@functools.cache
def loads(package: str) -> bool:
    """Installed and usable: a package built for another torch is there and fails when it is imported."""
    try:
        importlib.import_module(package)
    except Exception:  # whatever its extension raises
        return False
    return True
