"""Packages of kernels: one that is there but does not load counts as missing, and a CPU tensor takes none."""

import sys
from pathlib import Path

import pytest
import torch

from adamba.model.kernels_adamba import has_kernels, loads


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


def test_a_missing_package_counts_as_missing() -> None:
    assert not loads("no_such_package_of_kernels")
