"""Around `trainer.train()`: a broken loss stops the run in time, and a resume measures what it should."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerState

from adamba.errors import UserError
from adamba.flops import adapter_flops_per_token, flops_per_token
from adamba.training import session
from adamba.training.checkpoints import seal
from adamba.training.lora import LoraArguments, merge_adapters, peft_config
from adamba.training.session import tell_missing_kernels, train
from models import dense_base, hybrid


def test_a_broken_loss_stops_before_it_is_saved(make_trainer, tmp_path: Path) -> None:
    model = hybrid(0)
    trainer = make_trainer(model, save_strategy="steps", save_steps=2, save_total_limit=1, logging_steps=100)
    step = trainer.training_step

    def breaking_step(*args, **kwargs):
        if trainer.state.global_step == 5:
            with torch.no_grad():
                model.lm_head.weight[5, 0] = math.nan
        return step(*args, **kwargs)

    trainer.training_step = breaking_step
    with pytest.raises(UserError, match=r"learning_rate: 0\.01 is too high, loss became nan by step 6; the last good"):
        train(trainer)
    (kept,) = (tmp_path / "trainer").glob("checkpoint-*")
    assert kept.name == "checkpoint-4"


def test_a_run_stopped_after_its_last_step_is_not_trained_further(make_trainer) -> None:
    """Killed between its last checkpoint and publishing."""
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "logging_steps": 2}
    trained, model = hybrid(0), hybrid(0)
    first = train(make_trainer(trained, **settings))
    again = train(make_trainer(model, **settings))
    assert first["train_steps"] == again["train_steps"] == 8
    assert again["train_loss"] == pytest.approx(first["train_loss"], rel=1e-3)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_run_stopped_after_its_last_step_still_ends_with_its_best_model(make_trainer, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    train(make_trainer(hybrid(0), **settings))
    best, last = tmp_path / "trainer/checkpoint-4", tmp_path / "trainer/checkpoint-8"
    state = TrainerState.load_from_json(str(last / "trainer_state.json"))
    state.best_model_checkpoint = str(best)
    state.save_to_json(str(last / "trainer_state.json"))
    seal(last)
    model = hybrid(0)
    trainer = make_trainer(model, **settings)
    trainer.args.load_best_model_at_end = True
    train(trainer)
    kept = load_file(best / "model.safetensors")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in kept.items())


@pytest.mark.parametrize(("saved", "here"), [("FSDP", None), (None, "FSDP"), (None, "deepspeed"), ("ZeRO-3", None)])
def test_what_was_trained_under_another_sharding_is_published(saved, here, make_trainer, tmp_path: Path) -> None:
    """Stopped before it was published: nothing is left to train, so how its state was spread does not matter."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trained = hybrid(0)
    train(make_trainer(trained, **settings))
    checkpoint = tmp_path / "trainer/checkpoint-2"
    if saved == "FSDP":
        (checkpoint / "pytorch_model_fsdp.bin").touch()
    elif saved is not None:
        (checkpoint / "global_step2").mkdir()
        (checkpoint / "global_step2/zero_pp_rank_1_mp_rank_00_optim_states.pt").touch()
    seal(checkpoint)
    trainer = make_trainer(hybrid(0), **settings)  # which has learned nothing
    trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled = here == "FSDP", here == "deepspeed"
    assert train(trainer)["train_steps"] == 2
    (tmp_path / "published").mkdir()
    trainer.model.config.use_cache = True  # as `finish` does: the Trainer switched it off
    trainer.save_model(str(tmp_path / "published"))
    published = load_file(tmp_path / "published/model.safetensors")
    assert published and all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in published.items())
    assert not list((tmp_path / "published").glob("*.pt"))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (checkpoint, tmp_path / "published")]
    assert configs[0] | {"use_cache": True} == configs[1] != configs[0]


def test_adapters_of_a_finished_run_are_published_by_one_process(make_trainer, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}

    def adapted() -> PeftModel:
        return get_peft_model(hybrid(0), peft_config(LoraArguments(use_peft=True, lora_r=2)))

    trained, model = adapted(), adapted()
    train(make_trainer(trained, **settings))
    (tmp_path / "trainer/checkpoint-2/pytorch_model_fsdp.bin").touch()
    seal(tmp_path / "trainer/checkpoint-2")
    train(make_trainer(model, **settings))
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    trainer = make_trainer(adapted(), **settings)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(UserError, match="checkpoint-2 ends this run, .* one process publishes it"):
        train(trainer)


def test_a_resumed_run_measures_its_own_steps(make_trainer, tmp_path: Path, monkeypatch) -> None:
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "logging_steps": 2}
    first = train(make_trainer(hybrid(0), **settings))
    shutil.rmtree(tmp_path / "trainer" / "checkpoint-8")
    clock = iter((100.0, 102.0))
    monkeypatch.setattr(session.time, "monotonic", lambda: next(clock))
    again = train(make_trainer(hybrid(0), **settings))
    assert again["train_steps"] == 8
    assert again["train_seconds"] == pytest.approx(4.0), "2 seconds for half of the steps"
    assert 0 < again["train_loss"] < first["train_loss"]


@pytest.mark.parametrize(
    ("device", "loaded", "told"), [("cuda", False, True), ("cuda", True, False), ("cpu", False, False)]
)
def test_a_gpu_without_kernels_is_told_in_one_line(device, loaded, told, monkeypatch, caplog) -> None:
    monkeypatch.setattr("adamba.training.session.loads", lambda package: loaded)
    args = SimpleNamespace(device=torch.device(device))
    with caplog.at_level("INFO", logger="adamba"):
        tell_missing_kernels(SimpleNamespace(args=args, model=hybrid(0)))
    lines = [record.message for record in caplog.records]
    assert bool(lines) is told and all(line.startswith("mamba_ssm and causal_conv1d: not installed") for line in lines)


def test_adapters_are_what_learned_after_they_are_merged_too() -> None:
    model = hybrid(0)
    adapted = get_peft_model(model, peft_config(LoraArguments(use_peft=True, lora_r=4)))
    learned = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    plain = SimpleNamespace(unwrap_model=lambda found: found)
    trainer = SimpleNamespace(
        model=adapted, args=SimpleNamespace(world_size=1, beta=0.1, bf16=False, fp16=False), accelerator=plain
    )
    merge_adapters(trainer)
    measured = session.measures(trainer, 1.0, 100, 16)
    assert measured["num_trainable_parameters"] == learned < measured["num_parameters"] == model.num_parameters()
    assert measured["train_flops"] == pytest.approx(100 * adapter_flops_per_token(model.config, 16))
    trainer.ref_model = None  # GRPO and DPO ask the model without its adapters
    asked = session.measures(trainer, 1.0, 100, 16)["train_flops"] - measured["train_flops"]
    assert asked == pytest.approx(100 * flops_per_token(model.config, None, 16))


@pytest.mark.parametrize(
    ("asked", "fp32_precision", "tflops"),
    [({}, "ieee", 67), ({}, "tf32", 494.5), ({"bf16": True}, "ieee", 989), ({"weights": torch.bfloat16}, "ieee", 989)],
)
def test_mfu_is_of_the_rated_speed_in_the_runs_precision(asked, fp32_precision, tflops, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(session.torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=fp32_precision))
    model = hybrid(0, dtype=asked.get("weights", torch.float32))
    args = SimpleNamespace(world_size=2, bf16=asked.get("bf16", False), fp16=False)
    unwrapped = SimpleNamespace(unwrap_model=lambda found: found)
    measured = session.measures(SimpleNamespace(model=model, args=args, accelerator=unwrapped), 4.0, 100, 16)
    assert measured["mfu"] == pytest.approx(measured["train_flops"] / 4.0 / (2 * tflops * 1e12))


def test_liger_is_refused_where_it_would_replace_nothing(make_trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "is_liger_kernel_available", lambda: False)
    for model, reason in ((hybrid(0), "no kernels for a hybrid"), (dense_base("llama"), "is not installed")):
        with pytest.raises(UserError, match=f"use_liger_kernel: .*{reason}"):
            train(make_trainer(model, use_liger_kernel=True))
