"""Whom `make chat` talks to: the furthest finished phase."""

from pathlib import Path

import pytest

from adamba.chat import furthest_checkpoint
from adamba.errors import UserError


def test_furthest_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished phase"):
        furthest_checkpoint(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        furthest_checkpoint(tmp_path / "absent")
    for name in ("base", "phase5", "phase2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
    (tmp_path / "phase6_grpo").mkdir()
    assert furthest_checkpoint(tmp_path) == tmp_path / "phase5"
    (tmp_path / "phase2" / "config.json").write_text("{}")
    assert furthest_checkpoint(tmp_path / "phase2") == tmp_path / "phase2"


def test_a_team_is_passed_over(tmp_path: Path) -> None:
    for name in ("phase5", "phase6_grpo"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
    (tmp_path / "phase6_grpo" / "adapters" / "actor").mkdir(parents=True)
    (tmp_path / "phase6_grpo" / "adapters" / "actor" / "adapter_config.json").write_text("{}")
    assert furthest_checkpoint(tmp_path) == tmp_path / "phase5"
