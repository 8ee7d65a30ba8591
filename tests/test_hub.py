"""Pushing to the Hub: what arrives, what faults cost, and that the local copy is never lost."""

import argparse
import hashlib
from pathlib import Path

import huggingface_hub
import pytest
import torch

from adamba import hub as pushing
from adamba.errors import UserError
from adamba.hub import HubTarget, hub_target, push_folder
from hub_server import TOKEN, Hub, Repository, answers, cuts_the_connection, never_answers, running_hub

TARGET = HubTarget("me/adamba", "phase1", private=True)


@pytest.fixture
def hub(monkeypatch):
    """A local Hub that huggingface_hub talks to, and no time spent on waiting."""
    with running_hub() as running:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(pushing.time, "sleep", lambda seconds: None)
        huggingface_hub.close_session()
        yield running
    huggingface_hub.close_session()


@pytest.fixture
def folder(tmp_path) -> Path:
    published = tmp_path / "phase1"
    (published / "images").mkdir(parents=True)
    (published / "model.safetensors").write_bytes(torch.arange(1000.0).numpy().tobytes())
    (published / "config.json").write_text("{}")
    (published / "images/loss.png").write_bytes(b"png")
    (published / "training_args.bin").write_bytes(b"a pickle")
    return published


def content(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def keys(**changes) -> argparse.Namespace:
    settings = {"push_to_hub": True, "hub_model_id": "me/adamba", "hub_revision": None, "hub_private": True}
    return argparse.Namespace(**settings | changes)


def test_a_folder_becomes_a_branch(hub: Hub, folder) -> None:
    assert hub_target(keys(push_to_hub=False), folder) is None and not hub.requests
    target = hub_target(keys(), folder)
    assert target == TARGET and hub.repositories["me/adamba"].private is True
    push_folder(folder, target)
    pushed = hub.files("me/adamba", "phase1")
    assert sorted(pushed) == ["config.json", "images/loss.png", "model.safetensors"], "and no pickle"
    assert pushed["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert hub.files("me/adamba", "main") == {}
    (folder / "images/loss.png").unlink()
    (folder / "config.json").write_text('{"a": 1}')
    push_folder(folder, target)
    assert sorted(hub.files("me/adamba", "phase1")) == ["config.json", "model.safetensors"], "what is gone is removed"


def test_each_phase_has_its_branch(hub: Hub, folder) -> None:
    for output_dir, revision in (("checkpoints/phase1", None), ("checkpoints/phase2", None), ("x", "mine")):
        target = hub_target(keys(hub_revision=revision, hub_private=False), output_dir)
        push_folder(folder, target)
    assert set(hub.repositories["me/adamba"].branches) == {"main", "phase1", "phase2", "mine"}
    assert hub.repositories["me/adamba"].private is False


@pytest.mark.parametrize("fault", [answers(500), answers(429), cuts_the_connection], ids=["500", "429", "cut"])
@pytest.mark.parametrize("place", ["repos/create", "preupload", "lfs/objects/batch", "lfs-store", "/commit/"])
def test_faults_on_the_way_are_outlasted(hub: Hub, folder, place, fault) -> None:
    before = content(folder)
    hub.fail(place, fault, times=2)
    push_folder(folder, TARGET)
    assert hub.files("me/adamba", "phase1")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert content(folder) == before


def test_a_hub_that_does_not_answer_is_left_and_asked_again(hub: Hub, folder, monkeypatch) -> None:
    monkeypatch.setattr(pushing, "PATIENCE_SECONDS", 0.3)
    for place in ("lfs-store", "/commit/"):
        hub.fail(place, never_answers)
    push_folder(folder, TARGET)
    assert "model.safetensors" in hub.files("me/adamba", "phase1")


def test_uploaded_weights_are_not_uploaded_again(hub: Hub, folder) -> None:
    hub.fail("/commit/", answers(500), times=3)
    push_folder(folder, TARGET)
    assert sum("lfs-store" in request for request in hub.requests) == 1


def test_a_hub_that_stays_away_costs_one_line_and_no_file(hub: Hub, folder) -> None:
    before = content(folder)
    hub.fail("/commit/", answers(502), times=10**6)
    with pytest.raises(UserError, match=r"me/adamba: HTTP 502; .* is complete here, push it later with `hf upload me"):
        push_folder(folder, TARGET)
    assert content(folder) == before
    assert hub.files("me/adamba", "phase1") == {}, "half a push is no push"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hub_model_id": None}, "hub_model_id: missing; push_to_hub needs a repository"),
        ({"hub_model_id": "not a name"}, "hub_model_id: .*not a name"),
        (
            {"hub_model_id": "others/new"},
            r"others/new: no permission to write there \(HTTP 403\); use a",
        ),
        ({"hub_model_id": "others/theirs"}, r"others/theirs: no permission to write there \(HTTP 403\)"),
    ],
)
def test_a_repository_that_cannot_be_written_is_refused(hub: Hub, changes, message) -> None:
    hub.repositories["others/theirs"] = Repository()
    with pytest.raises(UserError, match=message):
        hub_target(keys(**changes), "phase1")
    assert not any("preupload" in request for request in hub.requests)


def test_no_token_and_no_network_are_named(hub: Hub, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=r"not logged in, or the token is no longer valid; run `hf auth login`"):
        hub_target(keys(), "phase1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, so nothing can be pushed"):
        hub_target(keys(), "phase1")
