"""Bad input gets one clear line naming file, key and value, exit code 2, and nothing is overwritten or lost."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from adamba.surgery import slice_width
from tiny_runs import DATA, ROOT, TRAIN, runner, save_base, save_hybrid, save_tokenizer, write_recipe

pytestmark = pytest.mark.smoke
Refuse = Callable[..., str]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints that nothing is wrong with: `dense`, `hybrid`, `sliced`, `gpt2`; and a tokenizer, too large."""
    folder = tmp_path_factory.mktemp("shelf")
    save_base(folder / "dense")
    hybrid = save_hybrid(folder / "hybrid")
    slice_width(hybrid, "normal").save_pretrained(folder / "sliced")
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=384, n_embd=16, n_layer=1, n_head=2))
    gpt2.save_pretrained(folder / "gpt2")
    save_tokenizer(folder / "sliced")
    save_tokenizer(folder / "gpt2")
    save_tokenizer(folder / "large_tokenizer", vocab_size=500)
    return folder


@pytest.fixture
def refuse(shelf: Path, tmp_path: Path, monkeypatch, capsys) -> Refuse:
    """Run a script on a recipe that must be refused; returns the one line of its error."""

    def run(script: str, recipe: dict, *options: str) -> str:
        monkeypatch.chdir(tmp_path)
        out = tmp_path / "out"
        out.mkdir()
        (out / "model.safetensors").write_text("the result of days")
        (out / "run.json").write_text('{"fingerprint": "a", "files": {"model.safetensors": {}}}')
        target = {} if script == "run_eval.py" else {"output_dir": "out"}  # it writes beside the model
        path = write_recipe(tmp_path / "x.yaml", target | recipe)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            runner(monkeypatch)(script, "x.yaml", *options)
        stderr = capsys.readouterr().err
        errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert stopped.value.code == 2 and len(errors) == 1 and "Traceback" not in stderr, stderr
        assert stderr.splitlines()[-1] == errors[0]
        assert path.is_file()
        assert sorted(file.name for file in out.iterdir()) == ["model.safetensors", "run.json"]
        assert (out / "model.safetensors").read_text() == "the result of days"
        assert not (tmp_path / "out.tmp").exists()
        return errors[0].removeprefix("error: ")

    return run


def surgery(operation: str, model: Path, **keys) -> dict:
    return DATA | {"operation": operation, "model_name_or_path": str(model), "num_check_rows": 2} | keys


# Recipes and command lines


@pytest.mark.parametrize("script", ["run_pretrain.py", "run_surgery.py"])
@pytest.mark.parametrize(
    ("keys", "options", "message"),
    [
        ({"learning_rat": 0.1, "operatoin": "slice"}, (), "x.yaml: key 'learning_rat': unknown"),
        ({"max_length": "long"}, (), "x.yaml: key 'max_length': got 'long' (text), needs whole number"),
        ({"mix": ["calculator"]}, (), "x.yaml: key 'mix': "),
        ({"mix": {"chess": 1.0}}, (), "mix: no data card 'chess'"),
        ({"mix": {"calculator": -1.0}}, (), "x.yaml: mix: weight of 'calculator' is -1"),
        ({"dtype": "int8"}, (), "x.yaml: dtype: 'int8' is unknown; use float32"),
        ({"model_name_or_path": None}, (), "x.yaml: model_name_or_path: missing; name a checkpoint"),
        ({}, ("--max_lenght", "9"), "command line: key 'max_lenght': unknown (given '9'); did you mean 'max_length'?"),
        ({}, ("--max_length", "long"), "command line: argument --max_length/--max-length: invalid int value: 'long'"),
        ({}, ("--max_length",), "command line: "),
        ({}, ("9",), "command line: unexpected argument '9'"),
    ],
)
def test_recipe_and_command_line(script, keys, options, message, shelf, refuse) -> None:
    good = {"run_pretrain.py": TRAIN, "run_surgery.py": surgery("expand", shelf / "hybrid", hidden_size=64)}[script]
    assert message in refuse(script, good | {"model_name_or_path": str(shelf / "hybrid")} | keys, *options)


@pytest.mark.parametrize("script", ["run_pretrain.py", "run_surgery.py", "run_eval.py", "run_sft.py"])
def test_a_missing_recipe(script: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        runner(monkeypatch)(script, "recipes/nowhere.yaml")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: recipes/nowhere.yaml: no such recipe\n"


def test_an_unknown_key_in_a_real_process(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "x.yaml", TRAIN | {"learning_rat": 0.1, "output_dir": str(tmp_path / "out")})
    command = [sys.executable, str(ROOT / "src/run_pretrain.py"), str(path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line == f"error: {path}: key 'learning_rat': unknown (given 0.1); did you mean 'learning_rate'?"
    assert not (tmp_path / "out").exists()


def test_an_impossible_width_in_a_real_process(shelf: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "x.yaml", surgery("slice", shelf / "hybrid", width=12, output_dir="out"))
    command = [sys.executable, str(ROOT / "src/run_surgery.py"), "x.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: x.yaml: width: 12 is not possible here; use a multiple of 8")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("text", ["- a\n- b\n", "mix: {\n", "", "\x00"])
def test_a_recipe_that_is_none(text: str, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        runner(monkeypatch)("run_pretrain.py", tmp_path / "x.yaml")
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith(f"error: {tmp_path / 'x.yaml'}: ")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"max_steps": 0}, "x.yaml: max_steps: 0 must be given, above 0"),
        ({"train_only": "attention"}, "train_only: 'attention' is unknown; use all, mamba"),
        ({"old_weight_lr_scale": 2.0}, "x.yaml: old_weight_lr_scale: 2.0 must be from 0 to 1"),
        ({"width_weights": {"ghost": -1.0}}, "x.yaml: width_weights: ghost=-1.0 must not be negative"),
        ({"max_length": 1}, "max_length: 1 is too small"),
        ({"max_length": 99999999}, "max_length: 99999999 is more than the model's 128 positions"),
        ({"task_settings": {"calculator": {"depht": 3}}}, "depht"),
        ({"task_settings": {"chess": {}}}, "settings: 'chess' is no task"),
        ({"data_files": {"calculator": "a.jsonl"}}, "data_files: 'calculator' is a task and makes its own rows"),
        ({"output_dir": "x.yaml"}, "output_dir: x.yaml is a file; name a folder"),
        ({"output_dir": "/dev/null"}, "output_dir: /dev/null is a file; name a folder"),
        ({"optim": "adam_best"}, "x.yaml: key 'optim'"),
        ({"lr_scheduler_type": "zigzag"}, "x.yaml: key 'lr_scheduler_type'"),
        ({"learning_rate": 1e18, "max_grad_norm": 0.0}, "learning_rate: 1e+18 is too high, "),
    ],
)
def test_pretraining_settings(keys, message, shelf, refuse) -> None:
    assert message in refuse("run_pretrain.py", TRAIN | {"model_name_or_path": str(shelf / "hybrid")} | keys)


@pytest.mark.parametrize("script", ["run_pretrain.py", "run_sft.py"])
@pytest.mark.parametrize(
    ("model", "keys", "message"),
    [
        ("hybrid", {"width_weights": {"tiny": 1.0}}, "width_weights: 'tiny' is no level of the model; use ghost"),
        ("hybrid", {"width_loss_weights": {"tiny": 1.0}}, "width_loss_weights: 'tiny' is no level of the model; use"),
        ("sliced", {}, "elastic: this checkpoint was sliced; train the elastic one that it came from"),
    ],
)
def test_what_elastic_training_cannot_do_is_said_before_data_is_read(
    script, model, keys, message, shelf, refuse
) -> None:
    asked = {"elastic": True, "distill": False, "mix": {"unreadable": 1.0}, "model_name_or_path": str(shelf / model)}
    assert f"x.yaml: {message}" in refuse(script, TRAIN | asked | keys)


def test_elastic_and_mamba_need_a_hybrid(shelf, refuse) -> None:
    dense = TRAIN | {"model_name_or_path": str(shelf / "dense")}
    line = refuse("run_pretrain.py", dense | {"elastic": True})
    assert "elastic: needs a hybrid" in line and str(shelf / "dense") in line and "LlamaForCausalLM" in line


def test_phase_1_needs_a_hybrid(shelf, refuse) -> None:
    line = refuse("run_pretrain.py", TRAIN | {"model_name_or_path": str(shelf / "dense"), "train_only": "mamba"})
    assert "train_only: 'mamba' matches no parameter of this LlamaForCausalLM" in line


# Shapes


@pytest.mark.parametrize(
    ("operation", "model", "keys", "message"),
    [
        ("slice", "hybrid", {"width": 12}, "width: 12 is not possible here; use a multiple of 8"),
        ("slice", "hybrid", {"width": 64}, "width: 64 is not possible here"),
        ("slice", "hybrid", {"width": "wide"}, "width: unknown level 'wide'; the levels are ghost, normal, think"),
        ("slice", "hybrid", {"width": [8]}, "width: 1 values given for 2 attention layers"),
        ("slice", "hybrid", {}, "x.yaml: width: missing; operation slice needs it"),
        ("slice", "dense", {"width": 8}, "slice needs a hybrid, but this is a LlamaForCausalLM"),
        ("expand", "hybrid", {"hidden_size": 36}, "hidden_size: 36 would need"),
        ("expand", "hybrid", {"hidden_size": 32}, "hidden_size: 32 must be above the present 32"),
        ("expand", "hybrid", {}, "x.yaml: hidden_size: missing; operation expand needs it"),
        (
            "expand",
            "hybrid",
            {"hidden_size": 40, "width_levels": {"a": 12, "b": 40}},
            "width_levels: 12 must be a mul",
        ),
        ("expand", "hybrid", {"hidden_size": 40, "width_levels": {"a": 8}}, "end at hidden_size = 40"),
        ("expand", "sliced", {"hidden_size": 40}, "this checkpoint was sliced"),
        ("sort", "sliced", {}, "this checkpoint was sliced"),
        ("expand", "dense", {"hidden_size": 64}, "expand needs a hybrid, but this is a LlamaForCausalLM"),
        ("insert", "hybrid", {}, "'adamba' is not a supported base; use Llama ('llama')"),
        ("insert", "gpt2", {}, "model_type: 'gpt2' is not a supported base; use Llama ('llama'), Qwen3"),
        ("insert", "dense", {"mamba_every": 0}, "mamba_every: 0 must be at least 1"),
        ("insert", "dense", {"width_levels": {"a": 12, "b": 32}}, "width_levels: 12 must be a multiple of 8"),
        ("insert", "dense", {"hybrid_config": {"mamba_head_dim": 7}}, "mamba_head_dim: 7 must divide"),
        ("insert", "dense", {"hybrid_config": {"mamba_stat_size": 8}}, "hybrid_config: 'mamba_stat_size' is unknown"),
        ("insert", "dense", {"hybrid_config": {"mamba_state_size": "8x"}}, "mamba_state_size"),
        ("shrink", "hybrid", {}, "x.yaml: operation: 'shrink' is unknown; use insert, expand, slice, sort"),
    ],
)
def test_surgery(operation, model, keys, message, shelf, refuse) -> None:
    line = refuse("run_surgery.py", surgery(operation, shelf / model, **keys))
    assert message in line and "x.yaml" in line


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"depth": 3}, "depth: 3 must be an even number"),
        ({"model_config": {"hidden_size": 30, "num_key_value_heads": 8}}, "hidden_size: 30 must be a multiple of"),
        ({"model_config": {"hiden_size": 32}}, "model_config: 'hiden_size' is unknown"),
        ({"model_config": {"model_type": "llama", "hiden_size": 32}}, "model_config: 'hiden_size' is unknown"),
        ({"model_config": {"model_type": "lama"}}, "model_config: "),
        ({"model_config": {"hidden_size": "wide"}}, "hidden_size"),
        ({"depth": 4, "model_config": {"model_type": "llama"}}, "depth: makes an adamba model, but"),
        ({"depth": 4, "model_name_or_path": "checkpoints/a"}, "model_name_or_path: cannot be combined with depth"),
        ({"depth": 4, "tokenizer_name_or_path": None}, "tokenizer_name_or_path: missing; a new model needs one"),
        ({"depth": 4, "tokenizer_name_or_path": None, "vocab_size": 20}, "vocab_size: 20 is too small"),
    ],
)
def test_new_models(keys, message, shelf, refuse) -> None:
    assert message in refuse("run_pretrain.py", TRAIN | {"tokenizer_name_or_path": str(shelf / "dense")} | keys)


# Checkpoints


def drop_model_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))


def rename_model_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "abacus"}))


def truncate_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def edit_weights(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def drop_norm(weights: dict) -> None:
    del weights["model.layers.1.norm.weight"]


def shrink_norm(weights: dict) -> None:
    weights["model.layers.1.norm.weight"] = weights["model.layers.1.norm.weight"][:8].clone()


def add_tensor(weights: dict) -> None:
    weights["model.layers.1.nothing.weight"] = weights["model.layers.1.norm.weight"].clone()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "broken: no such checkpoint folder"),
        (lambda folder: (folder / "config.json").unlink(), "broken: no config.json in it"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json: "),
        (drop_model_type, "config.json: key 'model_type' is missing"),
        (rename_model_type, "abacus"),
        (lambda folder: (folder / "model.safetensors").unlink(), "broken: cannot be loaded"),
        (truncate_weights, "broken: cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "broken: cannot be loaded"),
        (edit_weights(drop_norm), "broken: 1 missing weights, first model.layers.1.norm.weight"),
        (edit_weights(add_tensor), "broken: 1 unexpected weights, first model.layers.1.nothing.weight"),
        (edit_weights(shrink_norm), "model.layers.1.norm.weight"),
        (
            lambda folder: [file.unlink() for file in folder.glob("token*")],
            "broken: no tokenizer could be loaded: it has no tokenizer.json; tokenizer_name_or_path takes that",
        ),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "broken: no tokenizer could be loaded"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_broken_and_foreign_checkpoints(damage, message, shelf, refuse, tmp_path) -> None:
    shutil.copytree(shelf / "hybrid", tmp_path / "broken")
    damage(tmp_path / "broken")
    assert message in refuse("run_pretrain.py", TRAIN | {"model_name_or_path": "./broken"})


@pytest.mark.parametrize("script", ["run_surgery.py", "run_eval.py"])
@pytest.mark.parametrize("damage", [drop_model_type, truncate_weights])
def test_no_script_takes_a_broken_checkpoint(script, damage, shelf, refuse, tmp_path) -> None:
    shutil.copytree(shelf / "hybrid", tmp_path / "broken")
    damage(tmp_path / "broken")
    recipe = {
        "run_surgery.py": surgery("slice", "./broken", width="ghost"),
        "run_eval.py": DATA | {"model_name_or_path": "./broken"},
    }[script]
    assert "broken" in refuse(script, recipe)


def test_a_published_checkpoint_that_was_altered(shelf, refuse, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    slicing = write_recipe(
        tmp_path / "slice.yaml", surgery("slice", shelf / "hybrid", width=8, output_dir="published")
    )
    runner(monkeypatch)("run_surgery.py", slicing)
    truncate_weights(tmp_path / "published")
    line = refuse("run_pretrain.py", TRAIN | {"model_name_or_path": "published"})
    assert "published/model.safetensors: " in line and "truncated or overwritten" in line


def test_a_published_checkpoint_whose_record_is_broken(shelf, refuse, tmp_path, monkeypatch) -> None:
    shutil.copytree(shelf / "hybrid", tmp_path / "published")
    (tmp_path / "published" / "run.json").write_text('{"files": {"model')
    line = refuse("run_pretrain.py", TRAIN | {"model_name_or_path": "published"})
    assert "published/run.json: not the record of a finished run" in line


def test_a_tokenizer_with_more_tokens_than_the_model(shelf, refuse) -> None:
    keys = {"model_name_or_path": str(shelf / "hybrid"), "tokenizer_name_or_path": str(shelf / "large_tokenizer")}
    line = refuse("run_pretrain.py", TRAIN | keys)
    assert str(shelf / "large_tokenizer") in line and "key 'tokenizer_name_or_path'" in line
    assert "500 tokens, the model 384" in line or "tokens, the model" in line


# Data


@pytest.mark.parametrize("script", ["run_pretrain.py", "run_surgery.py"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "text.jsonl does not exist"),
        ("", "nothing to train on in text.jsonl: it holds no record"),
        ('{"text": "a"}\n{"text": \n{"text": "b"}\n', "text.jsonl: line 2, byte 14, is not JSON"),
        ("[1, 2]\n", "text.jsonl: record 1 is a list"),
        ('{"words": "a b"}\n', "column 'text' not found, the data has words"),
        ('{"text": "  "}\n' * 200, "rows dropped (an empty text"),
    ],
)
def test_data_files(script, content, message, shelf, refuse, tmp_path) -> None:
    if content is not None:
        (tmp_path / "text.jsonl").write_text(content)
    keys = {"mix": {"pydoc_topics": 1.0}, "data_files": {"pydoc_topics": "text.jsonl"}}
    good = {"run_pretrain.py": TRAIN, "run_surgery.py": surgery("slice", shelf / "hybrid", width=8)}[script]
    line = refuse(script, good | {"model_name_or_path": str(shelf / "hybrid")} | keys)
    if script == "run_surgery.py" and "nothing to train on" in message:
        message = "mix: "
    assert message in line
