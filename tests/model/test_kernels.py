"""Packages of kernels: one that is there but does not load counts as missing, and a CPU tensor takes none."""

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
    monkeypatch.delitem(__import__("sys").modules, "kernels_of_a_test", raising=False)
    assert loads("kernels_of_a_test") is expected
    assert not has_kernels("kernels_of_a_test", torch.zeros(1))


def test_a_missing_package_counts_as_missing() -> None:
    assert not loads("no_such_package_of_kernels")
