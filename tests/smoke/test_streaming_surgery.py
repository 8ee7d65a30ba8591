"""`run_surgery.py` from disk to disk: the weights that it writes from memory, or one line and nothing else."""

import json
import multiprocessing
import os
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import NanoChatConfig, NanoChatForCausalLM, PreTrainedTokenizerFast

from adamba.publish import verify_files
from adamba.surgery import streaming, tensor_files
from tiny_runs import DATA, HYBRID, LEVELS, runner, save_hybrid, task_texts, tensors, write_recipe

pytestmark = pytest.mark.smoke
SURGERY = DATA | {"num_check_rows": 2, "mix": {"calculator": 1.0}}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a surgery with these keys; returns its metrics."""
    monkeypatch.chdir(tmp_path)

    def operate(output_dir: str, **keys) -> dict:
        path = write_recipe(tmp_path / "x.yaml", SURGERY | keys | {"output_dir": output_dir})
        runner(monkeypatch)("run_surgery.py", path)
        verify_files(output_dir)
        assert not list(tmp_path.glob("*.tmp"))
        return json.loads((tmp_path / output_dir / "metrics.json").read_text())

    return operate


@pytest.fixture
def refused(run, capsys, tmp_path: Path):
    """The one line with which a surgery is refused; its output folder is not touched."""

    def operate(**keys) -> str:
        with pytest.raises(SystemExit) as stopped:
            run("out", **keys)
        assert stopped.value.code == 2 and not list(tmp_path.glob("out*"))
        return capsys.readouterr().err.strip().splitlines()[-1]

    return operate


def save_foreign_base(folder: Path) -> None:
    """A NanoChat whose tokenizer knows none of our chat tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        task_texts(), trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<eos>"])
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<eos>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 4, "vocab_size": len(tokenizer), "max_position_embeddings": 128, "pad_token_id": 0}
    NanoChatForCausalLM(NanoChatConfig(**sizes, **more)).to(torch.bfloat16).save_pretrained(folder)


def test_insert_expand_and_slice_as_in_memory(run, tmp_path: Path) -> None:
    save_foreign_base(tmp_path / "base")
    insert = {"operation": "insert", "model_name_or_path": "base", "width_levels": LEVELS, "hybrid_config": HYBRID}
    insert |= {"add_chat_tokens": True, "dtype": "bfloat16"}
    expand = {"operation": "expand", "hidden_size": 64, "dtype": "bfloat16"}
    slicing = {"operation": "slice", "width": "normal", "dtype": "bfloat16"}
    steps = {"hybrid": insert, "wide": expand | {"model_name_or_path": "hybrid_memory"}}
    steps |= {"narrow": slicing | {"model_name_or_path": "wide_memory"}}
    for name, keys in steps.items():
        memory = run(f"{name}_memory", streaming=False, **keys)
        streamed = run(f"{name}_streamed", streaming=True, **keys)
        first, second = tensors(tmp_path / f"{name}_memory"), tensors(tmp_path / f"{name}_streamed")
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name
        for file in ("config.json", "generation_config.json"):
            assert (tmp_path / f"{name}_memory" / file).read_text() == (
                tmp_path / f"{name}_streamed" / file
            ).read_text()
        assert streamed["max_abs_logit_diff"] <= 1e-4
        assert streamed["num_parameters"] == memory["num_parameters"]
        assert any(key.startswith("max_state_diff_layer_") for key in streamed)
    assert first["model.embed_tokens.weight"].shape[0] > 300, "the chat tokens have rows"


def test_a_checkpoint_that_is_large_for_the_memory_is_streamed_by_itself(run, tmp_path, monkeypatch, caplog) -> None:
    save_hybrid(tmp_path / "hybrid")
    caplog.set_level("INFO", logger="adamba")
    keys = {"operation": "expand", "model_name_or_path": "hybrid", "hidden_size": 64}
    assert "write_seconds" not in run("small", **keys)
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(10**6))
    assert "write_seconds" in run("large", **keys)
    assert "streaming from disk to disk: up to" in caplog.text
    first, second = tensors(tmp_path / "small"), tensors(tmp_path / "large")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_killed_surgery_goes_on_to_the_same_bits(run, tmp_path: Path, monkeypatch, caplog) -> None:
    caplog.set_level("INFO", logger="adamba")
    monkeypatch.setattr(streaming, "SHARD_SIZE", "50KB")
    save_hybrid(tmp_path / "hybrid")
    keys = {"operation": "expand", "model_name_or_path": "hybrid", "hidden_size": 64, "streaming": True}
    finish = tensor_files._finish

    def kill_after_three_files(**more) -> list[Path]:
        """In a process of its own; returns what it left."""

        def finish_or_die(part: Path, path: Path) -> None:
            if len(list(path.parent.glob("*.safetensors"))) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            finish(part, path)

        def surgery() -> None:
            torch.set_num_threads(1)  # OpenMP's threads do not outlive a fork
            with monkeypatch.context() as patch:
                patch.setattr(tensor_files, "_finish", finish_or_die)
                run("out", **keys | more)

        process = multiprocessing.get_context("fork").Process(target=surgery)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        return sorted((tmp_path / "out.surgery").glob("*/*.safetensors"))

    run("whole", **keys)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.safetensors*")}
    left = kill_after_three_files()
    assert [path.name for path in left] == sorted(whole)[:3] and len(whole) > 5
    left[0].write_bytes(left[0].read_bytes()[:-7])
    kept = left[1].stat().st_ino
    run("out", **keys)
    assert f"continuing: 2 of {len(whole) - 1} files are there" in caplog.text
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors*")} == whole
    assert (tmp_path / "out" / left[1].name).stat().st_ino == kept and not (tmp_path / "out.surgery").exists()

    kill_after_three_files(seed=1)
    caplog.clear()
    run("out", **keys)
    assert "discarding out.surgery/" in caplog.text and "continuing" not in caplog.text
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors*")} == whole


def test_what_cannot_be_streamed_is_one_line(refused, tmp_path: Path, monkeypatch) -> None:
    save_hybrid(tmp_path / "hybrid")
    keys = {"operation": "expand", "model_name_or_path": "hybrid", "hidden_size": 64, "streaming": True}
    assert "streaming: true, but operation sort" in refused(**keys | {"operation": "sort"})
    assert "hidden_size: 33 would need" in refused(**keys | {"hidden_size": 33})
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 5000, 5000))
        assert "output_dir: out needs" in (line := refused(**keys)) and "5e-06 GB free" in line
    with monkeypatch.context() as patch:  # a fault in what was written is found layer by layer, and nothing stays
        patch.setattr(streaming.Operated, "__getitem__", broken(streaming.Operated.__getitem__))
        assert "x.yaml: surgery: width 8: states differ from layer 1 on, by" in refused(**keys)
    with monkeypatch.context() as patch:
        patch.setattr("run_surgery.stream", full_disk)
        assert "output_dir: out: [Errno 28] No space left on device; what was there is unchanged" in refused(**keys)
    weights = tmp_path / "hybrid/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "hybrid: cannot be streamed:" in (line := refused(**keys)) and "truncated or overwritten" in line


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path, monkeypatch, capsys) -> None:
    path = write_recipe(tmp_path / "x.yaml", SURGERY | {"operation": "expand", "hidden_size": 64})
    options = ("--model_name_or_path", "nowhere/hybrid", "--output_dir", "/proc/adamba/out")  # not even root may
    with pytest.raises(SystemExit) as stopped:
        runner(monkeypatch)("run_surgery.py", path, *options)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: output_dir: /proc/adamba/out cannot be written: ")


def broken(original):
    def get(self, name: str) -> torch.Tensor:
        tensor = original(self, name)
        return tensor + 0.5 if name == "model.layers.1.mixer.out_proj.weight" else tensor

    return get


def full_disk(*_args, **_kwargs):
    raise OSError(28, "No space left on device")
