"""Packages of kernels: one that is there but does not load counts as missing, and a CPU tensor takes none."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from adamba.model import convolution_adamba, kernels_adamba, mamba_adamba
from adamba.model.kernels_adamba import has_kernels, loads
from models import hybrid, tokens


@pytest.fixture(autouse=True)
def forget():
    loads.cache_clear()
    yield
    loads.cache_clear()


@pytest.mark.parametrize(
    ("code", "expected"),
    [("", True), ("raise OSError('undefined symbol: _ZN3c10')", False), ("import nothing_of_that_name", False)],
)
def test_only_what_can_be_imported_counts(code: str, expected: bool, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "kernels_of_a_test.py").write_text(code + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kernels_of_a_test", raising=False)
    assert loads("kernels_of_a_test") is expected
    assert not has_kernels("kernels_of_a_test", torch.zeros(1))


@pytest.mark.parametrize(("version", "expected"), [("2.2.6.post3", False), ("2.3.0", True), ("2.10.1", True)])
def test_a_version_that_is_too_old_counts_as_missing(
    version: str, expected: bool, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "mamba_ssm.py").write_text(f"__version__ = {version!r}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mamba_ssm", raising=False)
    assert loads("mamba_ssm") is expected
    monkeypatch.delitem(sys.modules, "mamba_ssm", raising=False)


def test_double_precision_runs_in_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extensions stop at it; a model may have `dtype: float64`."""
    monkeypatch.setattr(kernels_adamba, "loads", lambda package: True)
    found = {
        dtype: has_kernels("causal_conv1d", SimpleNamespace(is_cuda=True, dtype=dtype))
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    }
    assert list(found.values()) == [False, True, True, True]


def test_a_missing_package_counts_as_missing() -> None:
    assert not loads("no_such_package_of_kernels")


def test_cached_tokens_meet_the_convolution_kernel_only_where_it_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `causal_conv1d` checks before it runs: 2 to 4 taps, and a state in the input's precision."""
    plain_update, plain_rows, called = mamba_adamba.causal_conv1d_update, mamba_adamba.causal_conv1d_fn, []

    def check(x, weight, state=None):
        called.append(x.dtype)
        assert 2 <= weight.shape[1] <= 4, "causal_conv1d only supports width between 2 and 4"
        assert state is None or state.dtype == x.dtype, "conv_state.scalar_type() == input_type"

    def update(x, state, weight, bias, activation):
        check(x, weight, state)
        return plain_update(x, state, weight, bias, activation=activation)

    def rows(x, weight, bias, activation, seq_idx=None):
        check(x, weight)
        return plain_rows(x, weight, bias, activation=activation)

    for module in (mamba_adamba, convolution_adamba):
        monkeypatch.setattr(module, "has_kernels", lambda package, tensor: package == "causal_conv1d")
        monkeypatch.setattr(module, "causal_conv1d_fn", rows)
    monkeypatch.setattr(mamba_adamba, "causal_conv1d_update", update)
    ids = tokens(0, length=40)
    for taps, autocast in ((4, False), (4, True), (6, False)):
        model = hybrid(0, mamba_num_groups=1, mamba_state_size=16, mamba_conv_kernel=taps)
        called.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # as the Trainer's, around the prompt alone
            output = model(ids[:, :10], use_cache=True)
        parts, place = [output.logits], 10
        for count in (1, 20, 1, 8):
            output = model(ids[:, place : place + count], past_key_values=output.past_key_values, use_cache=True)
            parts.append(output.logits)
            place += count
        assert bool(called) == (taps == 4)
        if not autocast:
            torch.testing.assert_close(torch.cat(parts, 1), model(ids[:, :place]).logits, rtol=1e-4, atol=1e-4)
