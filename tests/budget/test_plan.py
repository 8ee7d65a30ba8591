"""The price of a plan: sizes as surgery makes them, the full plan's own table, memory, variants and refusals."""

import dataclasses
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import run_plan
from adamba.budget import calibrate, sizes
from adamba.budget.memory import memory_gib
from adamba.budget.phases import Launch, PlannedPhase, read_plan
from adamba.budget.price import Machine, price, price_plan
from adamba.errors import UserError
from adamba.flops import layer_work, num_parameters
from adamba.gpus import find_gpu, rated_flops_per_second
from adamba.surgery import insert_mamba
from adamba.surgery.expand import expanded_config
from models import BASES, dense_base

ROOT = Path(__file__).parents[2]
H200 = Machine(find_gpu("h200"), 8, 1.96)
STATED_HOURS = {"phase1": 15, "phase2": 12, "phase3b": 10, "phase4b": 8, "phase5": 10, "phase6_grpo": 5}


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def plan(monkeypatch, capsys):
    """`plan("recipes", "--gpus", "4")` -> exit code and what was printed."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["src/run_plan.py", *arguments])
        try:
            run_plan.main()
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    return run


@pytest.mark.parametrize("kind", BASES)
def test_sizes_are_those_that_surgery_makes(kind) -> None:
    dense = dense_base(kind)
    options = {"mamba_state_size": 8, "mamba_head_dim": 8, "mamba_num_groups": 4, "first_exit_layer": 1}
    levels = {"ghost": 16, "think": 64}
    hybrid = insert_mamba(dense, every=2, width_levels=levels, **options)
    planned = sizes.inserted(sizes.config_from(dense.config.to_dict()), 2, levels, options)
    wide, planned_wide = expanded_config(hybrid.config, 80), sizes.expanded(planned, 80, None)
    for real, ours in ((hybrid.config, planned), (wide, planned_wide)):
        assert sum(num_parameters(ours).values()) == sum(num_parameters(real).values())
        assert layer_work(ours, 16, 32) == layer_work(real, 16, 32)
    assert sum(num_parameters(planned).values()) == hybrid.num_parameters()


def test_full_plan_takes_the_hours_that_it_states() -> None:
    priced = {entry.phase.name: entry for entry in price_plan(read_plan(Path("recipes")), H200)}
    for name, hours in STATED_HOURS.items():
        assert priced[name].hours == pytest.approx(hours, rel=0.1), name
        assert priced[name].usd == pytest.approx(hours * 8 * 1.96, rel=0.1), name
        stated = re.search(r"(\d+) h \(\$(\d+) at \$1\.96", (ROOT / f"recipes/{name}.yaml").read_text())
        assert stated and int(stated[1]) == hours
    training = {name: entry.usd for name, entry in priced.items() if not entry.phase.is_surgery}
    assert training.keys() == STATED_HOURS.keys(), "a new phase states its hours too"
    assert sum(training.values()) < sum(entry.usd for entry in priced.values()) < 1000
    assert all(entry.fits for entry in priced.values())
    assert "phase6_dpo" not in priced, "one of the two alternatives is paid for"


def test_a_phase_left_out_hands_its_input_on() -> None:
    short = read_plan(Path("recipes"), without=("phase4a", "phase4b"))
    assert {phase.name: phase.config.hidden_size for phase in short}["phase5"] == 2560
    assert {phase.name: phase.config.hidden_size for phase in read_plan(Path("recipes"))}["phase5"] == 4096


@pytest.mark.parametrize("family", ["recipes", "recipes/tiny", "recipes/smollm2", "recipes/agents"])
def test_every_family_can_be_priced(family, plan) -> None:
    code, shown = plan(family, "--gpus", "1", "--usd-per-gpu-hour", "2", "--mfu", "0.2", "--gpu", "b200")
    assert (code == 0) == (family != "recipes"), shown
    for phase in read_plan(Path(family)):
        assert phase.is_surgery or phase.flops > 0 and phase.num_trained <= phase.num_parameters
    if family == "recipes":
        assert "may not fit" in shown.splitlines()[-1] or "below the plan" in shown.splitlines()[-1]


def test_the_budget_is_kept_or_named(plan) -> None:
    asked = ("recipes/", "--gpu", "h200", "--gpus", "8", "--usd-per-gpu-hour", "1.96", "--max-usd")
    code, shown = plan(*asked, "1000")
    assert code == 0 and "MFU 35% assumed" in shown and re.search(r"total \$9\d\d of \$1,000: \$\d+ left", shown)
    assert "without phase 4" in shown and "phase6_dpo in place of phase6_grpo" in shown and "8 × a100" in shown
    code, shown = plan(*asked, "500")
    assert code == 2 and shown.splitlines()[-1].startswith("error: --max-usd: 500 is below the plan's $9")


def test_a_plan_of_cents_is_not_rounded_to_nothing(plan) -> None:
    code, shown = plan("recipes/tiny", "--max-usd", "0.001")
    assert code == 2 and re.search(r"--max-usd: 0\.001 is below the plan's \$0\.\d+", shown)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("recipes", "--gpu", "h20"), "--gpu: 'h20' is unknown; did you mean h200?"),
        (("recipes", "--gpus", "0"), "--gpus: 0 must be 1 or more"),
        (("recipes", "--mfu", "35"), "--mfu: 35 must be at most 1"),
        (("recipes", "--gpu", "cpu"), "--gpu: cpu has no rated speed; add --calibrate"),
        (("recipes/tin",), "recipes/tin: no such folder of recipes"),
    ],
)
def test_bad_options_get_one_line(plan, arguments, message) -> None:
    code, shown = plan(*arguments)
    assert code == 2 and shown.startswith(f"error: {message}") and len(shown.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("someone/unheard-of", "the sizes of someone/unheard-of are unknown here; download its config.json"),
        ("checkpoints/none/phase5", "there is no checkpoints/none/phase5/config.json here, which another family's"),
    ],
)
def test_unknown_base_names_what_would_help(tmp_path, plan, monkeypatch, name: str, message: str) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    recipe = {"model_name_or_path": name, "max_steps": 1, "output_dir": "checkpoints/x/phase1"}
    text = "# accelerate launch src/run_pretrain.py x\n# CPU, 1 h, 1 GiB\n" + yaml.safe_dump(recipe)
    (tmp_path / "phase1.yaml").write_text(text)
    code, shown = plan(str(tmp_path))
    assert code == 2 and f"phase1.yaml: model_name_or_path: {message}" in shown


def test_memory_follows_sharding() -> None:
    phase = next(phase for phase in read_plan(Path("recipes")) if phase.name == "phase4b")
    whole = sum(memory_gib(with_launch(phase, Launch(num_processes=8))).values())
    zero = [
        sum(memory_gib(with_launch(phase, Launch(8, True, *shards))).values())
        for shards in ((1, 1, 8), (1, 8, 8), (8, 8, 8), (8, 8, 8, True))
    ]
    assert whole > zero[0] > zero[1] > zero[2] > zero[3]
    parts = memory_gib(with_launch(phase, Launch(8, True, 8, 8, 8)))
    assert parts["weights"] == pytest.approx(2 * phase.num_parameters / 8 / 2**30)
    assert parts["optimizer"] == pytest.approx(12 * phase.num_parameters / 8 / 2**30)


@pytest.mark.parametrize(
    ("values", "bytes_by_part"),
    [
        ({"dtype": "bfloat16", "bf16": True}, {"weights": 4, "gradients": 4, "optimizer": 8}),
        ({"dtype": "float32", "bf16": True}, {"weights": 4, "gradients": 4, "optimizer": 8}),
        ({"dtype": "bfloat16", "bf16": False}, {"weights": 2, "gradients": 2, "optimizer": 4}),
    ],
)
def test_memory_of_fsdp_is_that_of_fp32_masters_under_mixed_precision(values, bytes_by_part) -> None:
    phase = next(phase for phase in read_plan(Path("recipes")) if phase.name == "phase4b")
    fsdp = Launch(8, False, 8, 8, 8, fsdp=True)
    planned = PlannedPhase(phase.name, phase.recipe, phase.script, phase.values | values, fsdp, phase.config)
    parts = memory_gib(planned)
    for part, num_bytes in bytes_by_part.items():
        assert parts[part] == pytest.approx(num_bytes * phase.num_parameters / 8 / 2**30), part
    in_bf16 = memory_gib(with_launch(phase, Launch(8, True, 8, 8, 8)))["activations"]
    assert parts["activations"] == pytest.approx(in_bf16), "what is computed is bf16 in any of these"


def test_gradients_that_the_head_makes_with_its_losses_are_counted() -> None:
    phase = next(phase for phase in read_plan(Path("recipes")) if phase.name == "phase2")
    tokens = phase.values["per_device_train_batch_size"] * phase.length
    made = 3 * phase.config.hidden_size * (4 * phase.config.vocab_size + 2 * tokens)  # full, narrow, an exit
    here, split = (with_launch(phase, launch) for launch in (Launch(), Launch(8, True, 8, 8, 8)))
    assert memory_gib(here)["logits"] - memory_gib(split)["logits"] == pytest.approx(made / 2**30)


def test_frozen_weights_stay_as_they_were_loaded_under_fsdp() -> None:
    phase = next(phase for phase in read_plan(Path("recipes")) if phase.name == "phase4b")
    values = phase.values | {"dtype": "bfloat16", "bf16": True, "train_only": "mamba"}
    fsdp = Launch(8, False, 8, 8, 8, fsdp=True)
    planned = PlannedPhase(phase.name, phase.recipe, phase.script, values, fsdp, phase.config)
    assert 0 < planned.num_trained < planned.num_parameters
    weights = 4 * planned.num_trained + 2 * (planned.num_parameters - planned.num_trained)
    assert memory_gib(planned)["weights"] == pytest.approx(weights / 8 / 2**30)


def with_launch(phase: PlannedPhase, launch: Launch) -> PlannedPhase:
    return PlannedPhase(phase.name, phase.recipe, phase.script, phase.values, launch, phase.config)


def test_a_recipe_without_bf16_is_priced_in_fp32(plan) -> None:
    phase = next(phase for phase in read_plan(Path("recipes")) if phase.name == "phase2")
    values = {key: value for key, value in phase.values.items() if key not in ("bf16", "dtype", "torch_compile")}
    changes = {"halves": {"bf16": True}, "fp32": {"bf16": False}, "unset": {}, "tf32": {"tf32": True}}
    changes |= {"weights": {"dtype": "bfloat16"}, "compiled": {"torch_compile": True}}
    changes |= {"compiled fp32": {"torch_compile": True, "tf32": False}}
    found = {}
    for name, change in changes.items():
        changed = dataclasses.replace(phase, values=values | change, launch=Launch())
        found[name] = price(changed, H200)
    assert found["fp32"].hours == found["unset"].hours == pytest.approx(found["halves"].hours * 989 / 67)
    assert found["compiled fp32"].hours == found["fp32"].hours and found["compiled"].hours == found["tf32"].hours
    assert found["tf32"].hours == pytest.approx(2 * found["halves"].hours)
    assert found["weights"].hours == found["halves"].hours
    assert found["fp32"].memory_gib > found["halves"].memory_gib
    by_trl = dataclasses.replace(phase, values=values, script="run_sft.py")
    assert by_trl.in_halves and not dataclasses.replace(by_trl, values=values | {"bf16": False}).in_halves
    _, shown = plan("recipes/tiny", "--gpu", "h200")
    assert "In fp32, of 67 TFLOP/s, as their recipes have no bf16: true: base, phase1, phase2, phase3b" in shown
    assert "In fp32" not in plan("recipes", "--gpu", "h200")[1]


@pytest.mark.parametrize(
    ("device", "tflops", "name"),
    [
        ("NVIDIA H100 PCIe", 756, "h100pcie"),
        ("NVIDIA H100 80GB HBM3", 989, "h100"),
        ("NVIDIA GeForce RTX 4090", 165, "rtx4090"),
        ("NVIDIA T4", None, "cpu"),
    ],
)
def test_a_gpu_is_rated_by_its_own_name(device: str, tflops: float | None, name: str, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: device)
    assert rated_flops_per_second() == (tflops or 0) * 1e12
    if tflops != 989:
        with pytest.raises(UserError, match=f"this machine has {device}, not h100; run it there, or --gpu {name}$"):
            calibrate.measure([], "h100")


def test_calibration_measures_each_phase(monkeypatch) -> None:
    phases = [phase for phase in read_plan(Path("recipes/tiny")) if phase.name in ("phase1", "phase2")]
    smaller = [
        PlannedPhase(p.name, p.recipe, p.script, p.values | {"max_length": 32, "per_device_train_batch_size": 1},
                     p.launch, p.config)
        for p in phases
    ]  # fmt: skip
    gpu, measured = calibrate.measure(smaller, "cpu")
    assert measured.keys() == {"phase1", "phase2"} and all(0 < value < 1 for value in measured.values())
    assert gpu.tflops > 0
    with pytest.raises(UserError, match="--calibrate: this machine has"):
        calibrate.measure(smaller, "mi300x")
    with pytest.raises(UserError, match=r"10\.8 G parameters, too many for a CPU"):
        calibrate.measure(read_plan(Path("recipes")), "cpu")


def test_large_models_are_measured_on_their_first_layers() -> None:
    phase = next(phase for phase in read_plan(Path("recipes")) if phase.name == "phase4b")
    short = calibrate.shortened(phase)
    assert short.num_hidden_layers == 4 and short.hidden_size == 4096
    assert layer_work(short, None, 64)[:4] == layer_work(phase.config, None, 64)[:4]


def test_planning_loads_no_modeling_code() -> None:
    """What keeps `run_plan.py` fast: sizes only."""
    code = (
        "import sys; sys.path.insert(0, 'src'); import run_plan; print('adamba.model.modeling_adamba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_family_elsewhere_needs_no_checkpoints(tmp_path, plan) -> None:
    for path in (ROOT / "recipes/tiny").glob("*.yaml"):
        shutil.copy(path, tmp_path)
    code, shown = plan(str(tmp_path), "--gpu", "l40s", "--gpus", "1", "--max-usd", "5")
    assert code == 0, shown


def test_memory_counts_the_chunks_of_logits_that_training_makes() -> None:
    from adamba.budget import memory
    from adamba.training import head_losses

    assert memory.LOGITS_AT_ONCE == head_losses.LOGITS_AT_ONCE["cuda"]


def test_a_reader_that_stops_early_ends_it_in_silence() -> None:
    words = [sys.executable, "-u", str(ROOT / "src" / "run_plan.py"), str(ROOT / "recipes")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as plan:
        assert plan.stdout is not None and plan.stderr is not None
        plan.stdout.close()
        assert plan.stderr.read() == b"" and plan.wait() == -signal.SIGPIPE
