"""Recipes: what a value may be, where it comes from, and the one line a mistake gets."""

import contextlib
import os
import subprocess
import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from transformers import TrainingArguments
from trl import GRPOConfig, SFTConfig

from adamba.errors import UserError, user_errors
from adamba.recipe import parse, read_recipe
from adamba.recipe_file import launch_command


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Arguments:
    learning_rate: float = 1e-3
    lora_r: int = 16
    name: str = "run"
    save: str = "steps"
    shuffle: bool = True
    mode: Literal["pack", "pad"] = "pack"
    colour: Colour | str = "red"
    limit: int | None = None
    widths: list[int] = field(default_factory=lambda: [32, 64])
    width: int | list[int] | str = "auto"
    mix: dict[str, float] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] | None = None
    targets: list[str] | None = None
    thresholds: tuple[float, ...] = (0.9,)

    def __post_init__(self) -> None:
        if self.lora_r < 1:
            raise ValueError(f"lora_r must be at least 1,\n  got {self.lora_r}")


@dataclass
class Mixture:
    mix: dict[str, float] = field(default_factory=dict)
    width: int | list[int] | str = "auto"
    seed_of_mixture: int = 3


@dataclass
class Needs:
    model_name_or_path: str


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return str(path)


def test_default_then_recipe_then_command_line(tmp_path):
    path = write(tmp_path, "learning_rate: 0.5\nlora_r: 8\n")
    args, recipe = parse(Arguments, argv=[path, "--lora_r", "4"], script="src/run_x.py")
    assert (args.learning_rate, args.lora_r, args.name) == (0.5, 4, "run")
    assert recipe.values == {"learning_rate": 0.5, "lora_r": 4}
    assert recipe.path == path and recipe.script == "src/run_x.py"
    assert recipe.resolved["name"] == "run" and recipe.resolved["widths"] == [32, 64]


def test_resolved_recipe_is_a_recipe_of_the_same_run(tmp_path):
    path = write(tmp_path, "mix: {a: 1}\nwidth: [1, 2]\n")
    argv = [path, "--output_dir", str(tmp_path), "--use_cpu"]
    args, training_args, recipe = parse(Mixture, TrainingArguments, argv=argv)
    again = write(tmp_path, yaml.safe_dump(recipe.resolved))
    args_again, training_again, _ = parse(Mixture, TrainingArguments, argv=[again])
    assert args == args_again and args.seed_of_mixture == 3
    assert training_args.output_dir == training_again.output_dir
    # library defaults depend on the library's version, which run.json records; they would drown the recipe
    assert set(recipe.resolved) == {"mix", "width", "output_dir", "use_cpu", "seed_of_mixture"}


def test_what_was_asked_is_the_recipe_and_what_the_command_line_gave(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: kept\n")
    words = ["--mix", "a=1.0", "--model_name_or_path", "here"]
    *_, recipe = parse(Arguments, Needs, argv=[str(path), *words], script="src/run_x.py")
    assert recipe.asked == f"{path} --mix {{'a': 1.0}}"
    *_, recipe = parse(Arguments, argv=["--lora_r", "3"], script="src/run_x.py")
    assert recipe.asked == "run_x.py --lora_r 3"


@pytest.mark.parametrize("flag", [["--config", "PATH"], ["--config=PATH"], ["PATH"]])
def test_recipe_can_be_given_in_three_ways(tmp_path, flag):
    path = write(tmp_path, "lora_r: 2\n")
    args, recipe = parse(Arguments, argv=[word.replace("PATH", path) for word in flag] + ["--name", "n"])
    assert (args.lora_r, args.name, recipe.path) == (2, "n", path)


def test_two_parses_do_not_see_each_others_values(tmp_path):
    parse(Arguments, argv=[write(tmp_path, "lora_r: 2\nmix: {a: 1.0}\n")])
    args, _ = parse(Arguments, argv=[])
    assert args == Arguments()


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("learning_rate: 3", "learning_rate", 3.0),
        ("mix: {calculator: 1, tic_tac_toe: 0.5}", "mix", {"calculator": 1.0, "tic_tac_toe": 0.5}),
        ("mix:\n  calculator: 1e-1", "mix", {"calculator": 0.1}),
        ("settings: {calculator: {depth: 3}}", "settings", {"calculator": {"depth": 3}}),
        ("settings: null", "settings", None),
        ("widths: [8]", "widths", [8]),
        ("width: 64", "width", 64),
        ("width: [64, 32]", "width", [64, 32]),
        ("width: ghost", "width", "ghost"),
        ("thresholds: [0.5, 1]", "thresholds", (0.5, 1.0)),
        ("save: 'no'", "save", "no"),
        ("colour: blue", "colour", "blue"),
        ("limit: 3", "limit", 3),
        ("shuffle: off", "shuffle", False),
    ],
)
def test_yaml_values(tmp_path, text, key, value):
    args, recipe = parse(Arguments, argv=[write(tmp_path, text)])
    assert getattr(args, key) == value and type(getattr(args, key)) is type(value)
    assert recipe.values == {key: value}


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        ("--mix calculator=1.0,tic_tac_toe=0.5", "mix", {"calculator": 1.0, "tic_tac_toe": 0.5}),
        ("--mix {calculator: 1}", "mix", {"calculator": 1.0}),
        ("--settings {calculator: {depth: 3}}", "settings", {"calculator": {"depth": 3}}),
        ("--widths 8 16", "widths", [8, 16]),
        ("--widths 8,16", "widths", [8, 16]),
        ("--widths [8, 16]", "widths", [8, 16]),
        ("--width 64", "width", 64),
        ("--width 64,32", "width", [64, 32]),
        ("--width auto", "width", "auto"),
        ("--targets q_proj v_proj", "targets", ["q_proj", "v_proj"]),
        ("--thresholds 0.5 1", "thresholds", (0.5, 1.0)),
        ("--learning_rate 1e-4", "learning_rate", 1e-4),
        ("--learning-rate=1", "learning_rate", 1.0),
        ("--shuffle false", "shuffle", False),
        ("--no_shuffle", "shuffle", False),
        ("--limit 3", "limit", 3),
        ("--mode pad", "mode", "pad"),
    ],
)
def test_command_line_values(words, key, value):
    argv = words.split(" ", 1) if "{" in words or "[" in words else words.split()
    args, recipe = parse(Arguments, argv=argv)
    assert getattr(args, key) == value and type(getattr(args, key)) is type(value)
    assert recipe.values == {key: value}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 0.1", "key 'lr': unknown (given 0.1); did you mean 'learning_rate'?"),
        ("lora_rank: 1", "key 'lora_rank': unknown (given 1); did you mean 'lora_r'?"),
        ("zzzzqqq: 1", "key 'zzzzqqq': unknown (given 1)"),
        (
            "lr: 1\nnmae: x",
            "key 'lr': unknown (given 1); did you mean 'learning_rate'?; "
            "key 'nmae': unknown (given 'x'); did you mean 'name'?",
        ),
        ("lora_r: 8.5", "key 'lora_r': got 8.5 (a number), needs whole number"),
        ("lora_r: '8'", "key 'lora_r': got '8' (text), needs whole number"),
        ("lora_r: true", "key 'lora_r': got True (true or false), needs whole number"),
        ("lora_r: null", "key 'lora_r': got null, needs whole number"),
        ("lora_r: 0", "lora_r must be at least 1, got 0"),
        ("learning_rate: fast", "key 'learning_rate': got 'fast' (text), needs number"),
        ("shuffle: 1", "key 'shuffle': got 1 (a whole number), needs true or false"),
        (
            "save: no",
            "key 'save': got False (true or false), needs text; YAML reads a bare no or off as false, so quote",
        ),
        ("mode: pck", "key 'mode': got 'pck' (text), needs one of 'pack', 'pad'; did you mean 'pack'?"),
        ("colour: bleu", "key 'colour': got 'bleu' (text), needs one of 'red', 'blue' or text; did you mean 'blue'?"),
        ("mix: 3", "key 'mix': got 3 (a whole number), needs mapping of text to number"),
        ("mix: {calculator: much}", "key 'mix': 'calculator': got 'much' (text), needs number"),
        ("widths: [8, x]", "key 'widths': item 1: got 'x' (text), needs whole number"),
        ("widths: 8", "key 'widths': got 8 (a whole number), needs list of whole number"),
        ("lora_r: 1\nlora_r: 2", "not valid YAML: key 'lora_r' is given twice, again on line 2"),
        ("a: [1", "not valid YAML: line 1, column 6: expected ',' or ']', but got '<stream end>'"),
        ("mix: {a: 1\nx: 3", "not valid YAML: line 2, column 2: expected ',' or '}', but got ':'"),
        ("just text", "a recipe is lines of `key: value`"),
        ("", "a recipe is lines of `key: value`"),
        ("env: 3", "key 'env': got 3, needs a mapping of environment variables"),
    ],
)
def test_bad_recipe_gets_one_line_naming_file_key_and_value(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        parse(Arguments, argv=[path])
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lora_rr", "3"], "command line: key 'lora_rr': unknown (given '3'); did you mean 'lora_r'?"),
        (["--lora-rr=3"], "command line: key 'lora_rr': unknown (given '3'); did you mean 'lora_r'?"),
        (["--learn", "3"], "command line: key 'learn': unknown (given '3')"),  # no abbreviations
        (["--lora_r", "8.5"], "command line: argument --lora_r/--lora-r: invalid int value: '8.5'"),
        (["--lora_r"], "command line: argument --lora_r/--lora-r: expected one argument"),
        (["--mode", "x"], "command line: argument --mode: invalid choice: 'x'"),
        (["--mix", "calculator"], "command line: key 'mix': got 'calculator' (text), needs mapping"),
        (["--mix", "calculator=x"], "command line: key 'mix': 'calculator': got 'x' (text), needs number"),
        (["--mix", "{a: 1"], "command line: key 'mix': got '{a: 1', which is not valid YAML"),
        (["--widths", "8", "x"], "command line: key 'widths': item 1: got 'x' (text), needs whole number"),
        (["--name", "a", "b.yaml"], "command line: unexpected argument 'b.yaml'; the recipe comes first"),
    ],
)
def test_bad_command_line_gets_one_line(argv, message):
    with pytest.raises(UserError) as caught:
        parse(Arguments, argv=argv)
    assert str(caught.value).startswith(message)


def test_missing_recipe_names_the_nearest(tmp_path):
    path = write(tmp_path, "lora_r: 1")
    with pytest.raises(UserError, match=r"y\.yaml: no such recipe; did you mean .*x\.yaml\?"):
        read_recipe(path.replace("x.yaml", "y.yaml"))
    with pytest.raises(UserError, match="cannot read this recipe"):
        read_recipe(tmp_path)


def test_required_key_may_come_from_either_side(tmp_path):
    path = write(tmp_path, "model_name_or_path: here")
    assert parse(Needs, argv=[path])[0].model_name_or_path == "here"
    assert parse(Needs, argv=["--model_name_or_path", "there"])[0].model_name_or_path == "there"
    with pytest.raises(UserError, match="key 'model_name_or_path': required, give it a text"):
        parse(Needs, argv=[])


def test_environment_of_a_recipe_is_set_and_only_when_the_recipe_is_good(tmp_path, monkeypatch):
    monkeypatch.delenv("ADAMBA_TEST", raising=False)
    with pytest.raises(UserError):
        parse(Arguments, argv=[write(tmp_path, "env: {ADAMBA_TEST: 1}\nlora_r: x")])
    assert "ADAMBA_TEST" not in os.environ
    parse(Arguments, argv=[write(tmp_path, "env: {ADAMBA_TEST: 1}")])
    assert os.environ.pop("ADAMBA_TEST") == "1"


@pytest.mark.parametrize("config", [TrainingArguments, SFTConfig, GRPOConfig])
def test_library_dataclasses_parse_and_check(tmp_path, config):
    good = "use_cpu: true\nbf16: false\nlearning_rate: 1e-4\neval_strategy: 'no'\nreport_to: none\nwarmup_steps: 0.1\n"
    good += "lr_scheduler_kwargs: {min_lr: 0.1}\nlr_scheduler_type: cosine_with_min_lr\n"
    _, training_args, _ = parse(Mixture, config, argv=[write(tmp_path, good), "--output_dir", str(tmp_path)])
    assert training_args.learning_rate == 1e-4 and training_args.lr_scheduler_kwargs == {"min_lr": 0.1}
    with pytest.raises(UserError, match="key 'eval_strategy': got 'stepps' .*did you mean 'steps'"):
        parse(Mixture, config, argv=[write(tmp_path, "eval_strategy: stepps")])
    with pytest.raises(UserError, match="key 'torch_dtyp': unknown"):
        parse(Mixture, config, argv=[write(tmp_path, "torch_dtyp: x")])
    with pytest.raises(UserError, match=r"key 'warmup_ratio': unknown \(given 0.1\); did you mean 'warmup_steps'"):
        parse(Mixture, config, argv=[write(tmp_path, "warmup_ratio: 0.1")])


def test_script_ends_with_one_line_and_code_2(tmp_path):
    script = tmp_path / "run_x.py"
    script.write_text(
        "from dataclasses import dataclass\nfrom adamba.errors import user_errors\nfrom adamba.recipe import parse\n"
        "@dataclass\nclass A:\n    learning_rate: float = 1.0\n"
        "@user_errors()\ndef main():\n    parse(A)\nmain()\n"
    )
    path = write(tmp_path, "lr: 1")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent / "src")}
    command = [sys.executable, str(script), path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if "Warning" not in line]
    assert lines[-1] == f"error: {path}: key 'lr': unknown (given 1); did you mean 'learning_rate'?"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("fails", [False, True])
def test_a_process_leaves_its_group_at_a_clean_end(fails: bool) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with contextlib.suppress(RuntimeError), user_errors():
            if fails:
                raise RuntimeError("others may still wait")
        assert torch.distributed.is_initialized() == fails
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_user_errors_lets_other_errors_through(capsys):
    with pytest.raises(SystemExit) as caught, user_errors():
        raise UserError("recipes/x.yaml:\n   bad")
    assert caught.value.code == 2 and capsys.readouterr().err == "error: recipes/x.yaml: bad\n"
    with pytest.raises(ValueError, match="plain"), user_errors():
        raise ValueError("plain")


def test_launch_command(tmp_path):
    path = write(tmp_path, "# accelerate launch --config_file a.yaml src/run_sft.py recipes/x.yaml\nlora_r: 1\n")
    assert launch_command(path)[4] == "src/run_sft.py"
    with pytest.raises(UserError, match="its first line must be"):
        launch_command(write(tmp_path, "lora_r: 1\n"))
