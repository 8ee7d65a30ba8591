"""`run_data.py`: every command, on local files, with bad input."""

import json
from pathlib import Path

import pytest
import yaml

import run_data

ROWS = Path(__file__).parents[1] / "data/rows"
pytestmark = pytest.mark.smoke


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["run_data.py", *map(str, arguments)])
        run_data.console.width = 200
        run_data.main()
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    return call


def refused(run, capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        run(*arguments)
    assert exit.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_list_names_every_dataset_and_its_licence(run):
    output = run("list")
    for source in ("fineweb", "openorca", "flan_cot", "metamath", "glaive_fc", "toolbench", "sharegpt", "calculator"):
        assert source in output
    assert "Open-Orca/OpenOrca" in output and "cc-by-nc-4.0" in output


def test_show_renders_rows_as_the_model_sees_them(run, monkeypatch):
    shown = []
    monkeypatch.setattr(run_data, "coloured", lambda row, renderer: shown.append((row, renderer)) or "")
    run("show", "sharegpt", "-n", 2, "--data-files", f"sharegpt={ROWS / 'sharegpt.jsonl'}")
    assert len(shown) == 2
    monkeypatch.undo()
    text = run_data.coloured(*shown[0])
    assert text.plain.startswith("<|im_start|>user\nSummarize") and text.plain.endswith("Traffic.<|im_end|>")
    green = [text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style)]
    assert green == ["Here are the main ideas: 1. Traffic.<|im_end|>"]
    steering = [{"role": "user", "content": "a\u202eb\x1b[2J"}, {"role": "assistant", "content": "c"}]
    shown_safely = run_data.coloured({"messages": steering}, shown[0][1]).plain
    assert "b\ufffd[2J" in shown_safely and "\u202e" not in shown_safely


@pytest.mark.parametrize("source", ["calculator", "tic_tac_toe", "pydoc_topics"])
def test_show_what_needs_no_files(run, source):
    assert f"{source} test row 1:" in run("show", source, "-n", 1, "--split", "test")


def test_numbers_that_count_nothing_and_an_empty_key_are_no_traceback(run, capsys, tmp_path):
    for words in (("show", "calculator", "-n", -1), ("download", "fineweb", "--max-files", 0)):
        assert refused(run, capsys, *words) == "error: command line: -n and --max-files must be 1 or more"
    (tmp_path / "recipe.yaml").write_text("mix: {calculator: 1.0}\ndata_files: null\n")
    assert "calculator: 5 rows" in run("stats", "recipe.yaml", "-n", 5)


def test_the_keys_that_errors_and_recipes_name_are_options_too(run):
    assert "Say hi" in run("show", "rollouts", "-n", 1, "--data_files", f"rollouts={ROWS / 'preference.jsonl'}")


def test_show_preference_pairs(run):
    assert "Say hi" in run("show", "rollouts", "-n", 1, "--data-files", f"rollouts={ROWS / 'preference.jsonl'}")


def test_stats_count_rows_drops_reasons_and_duplicates(run, tmp_path):
    lines = (ROWS / "metamath.jsonl").read_text().splitlines()
    (tmp_path / "twice.jsonl").write_text("\n".join([*lines, lines[0]]))
    output = run("stats", "metamath", "--data-files", f"metamath={tmp_path / 'twice.jsonl'}")
    assert "metamath: 7 rows" in output
    assert "dropped: 4 of 11 (36.4 %), duplicates: 1 (14.3 %)" in output
    assert "no column response: 1" in output and "tokens" in output and "█" in output


def recipe(tmp_path, **changes):
    values = {"mix": {"calculator": 3.0, "glaive_fc": 1.0}, "learning_rate": 1.0}
    values["data_files"] = {"glaive_fc": str(ROWS / "glaive.jsonl")}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return path


def test_stats_of_a_recipe_compare_the_mix_with_what_was_asked(run, tmp_path):
    output = run("stats", recipe(tmp_path), "-n", 400)
    assert "calculator 3.0 (75.0 %), glaive_fc 1.0 (25.0 %)" in output
    share = float(output.split("calculator: asked 75.0 %, comes as ")[1].split(" %")[0])
    assert abs(share - 75) < 6


def test_check_reports_each_source(run, tmp_path, capsys):
    output = run("check", recipe(tmp_path))
    assert "✓ calculator: 20 rows read" in output and "✓ glaive_fc: 7 rows read, 9 of 16 rows dropped" in output
    message = refused(run, capsys, "check", recipe(tmp_path, data_files={"glaive_fc": "nowhere.json"}))
    assert message.endswith("1 of 2 sources cannot be read: glaive_fc")
    mix = {"mix": {"calculator": 1.0, "toolbench": 1.0, "rollouts": 1.0}}
    assert refused(run, capsys, "check", recipe(tmp_path, **mix)).endswith("cannot be read: rollouts, toolbench")


def test_truncated_file_is_named_or_salvaged(run, tmp_path, capsys):
    records = [{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}] * 30
    text = json.dumps(records)
    (tmp_path / "cut.json").write_text(text[: len(text) // 2 + 30])
    files = ("--data-files", f"sharegpt={tmp_path / 'cut.json'}")
    message = refused(run, capsys, "stats", "sharegpt", *files)
    assert "cut.json: cut off in the record that starts at byte" in message
    assert "rows," in run("stats", "sharegpt", *files, "--on-bad-file", "skip")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "glaive"), "did you mean 'glaive_fc'"),
        (("download", "glaive"), "no data card 'glaive'"),
        (("download", "calculator"), "nothing to download"),
        (("stats", "nowhere.yaml"), "nowhere.yaml: no such recipe"),
        (("show", "openorca", "--data-files", "openorca=nowhere"), "nowhere does not exist"),
        (("show", "toolbench"), "it lives in no repository"),
    ],
)
def test_bad_input_is_one_line(run, capsys, arguments, message):
    assert message in refused(run, capsys, *arguments)
