"""`torch_compile`: layers compiled one by one compute what they did, once for a kind and width, in training only."""

from pathlib import Path

import pytest
import torch

from adamba.errors import UserError
from adamba.model import AdambaForCausalLM
from adamba.training import compiling
from adamba.training.compiling import compile_for_training, compile_layers, take_over_compilation
from adamba.training.elastic import Draw, ElasticArguments, Tally, elastic_loss
from adamba.training.pretraining import PretrainConfig
from adamba.training.sft import MixSFTConfig
from models import hybrid, labelled, tokens
from tiny_runs import TRAIN, runner, save_base, save_hybrid, tensors, write_recipe

SHAPES = {"layer_types": ["full_attention", "linear_attention"] * 3, "num_hidden_layers": 6, "sliding_window": None}


def counting(graphs: list[torch.fx.GraphModule]):
    """A backend that runs what it is given, and keeps it."""

    def backend(graph: torch.fx.GraphModule, inputs):
        graphs.append(graph)
        return graph.forward

    return backend


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_an_elastic_step_is_the_same(seed: int, checkpointing: bool) -> None:
    steps = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = hybrid(seed, **SHAPES).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if compiled:
            compile_for_training(model, backend="aot_eager")
        chosen = Draw({0: model.config.width_levels["ghost"]}, [model.config.gate_layers[0]], None)
        loss = elastic_loss(model, model, labelled(seed), ElasticArguments(elastic=True), chosen, 10, Tally())
        loss.backward()
        steps.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (plain_loss, plain), (loss, gradients) = steps
    torch.testing.assert_close(loss, plain_loss)
    assert gradients.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


def test_each_kind_of_layer_is_compiled_once_for_a_width_and_decoding_not_at_all() -> None:
    torch.compiler.reset()
    graphs: list[torch.fx.GraphModule] = []
    model, ids = hybrid(0, **SHAPES).train(), tokens(0)
    compile_for_training(model, backend=counting(graphs))
    model(ids, labels=ids, use_cache=False).loss.backward()
    first = len(graphs)
    assert 0 < first < len(model.model.layers)  # three of each kind
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert len(graphs) == first
    model(ids, labels=ids, use_cache=False, width="ghost").loss.backward()
    assert first < len(graphs) <= first + 2  # attention; Mamba has one width
    known = len(graphs)
    model.generate(ids, max_new_tokens=4)
    model.eval()(ids)
    assert len(graphs) == known


def test_names_classes_and_files_stay(tmp_path: Path) -> None:
    model = hybrid(0, **SHAPES)
    names = list(model.state_dict())
    compile_for_training(model, backend="eager")
    assert list(model.state_dict()) == names
    assert {type(layer).__name__ for layer in model.model.layers} == {"AttentionLayer", "MambaLayer"}
    model.save_pretrained(tmp_path)
    ids = tokens(0)
    torch.testing.assert_close(AdambaForCausalLM.from_pretrained(tmp_path)(ids).logits, model.eval()(ids).logits)


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["hybrid", "dense"])
def test_a_run_with_compiled_layers_ends_with_the_same_weights(kind: str, tmp_path: Path, monkeypatch) -> None:
    (save_hybrid if kind == "hybrid" else save_base)(tmp_path / "start")
    run = runner(monkeypatch)
    values = TRAIN | {"model_name_or_path": str(tmp_path / "start"), "elastic": kind == "hybrid"}
    for name, options in (("plain", []), ("compiled", ["--torch_compile", "true"])):
        torch.compiler.reset()
        recipe = write_recipe(tmp_path / f"{name}.yaml", values | {"output_dir": str(tmp_path / name)})
        run("run_pretrain.py", recipe, *options, *(["--torch_compile_backend", "aot_eager"] if options else []))
    plain, compiled = tensors(tmp_path / "plain"), tensors(tmp_path / "compiled")
    assert plain.keys() == compiled.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-3, atol=1e-4)


def test_rows_of_changing_length_are_refused(tmp_path: Path) -> None:
    options = {"output_dir": str(tmp_path), "torch_compile": True, "use_cpu": True, "bf16": False}
    with pytest.raises(UserError, match="^torch_compile: needs rows of one length"):
        take_over_compilation(MixSFTConfig(**options, packing=False, max_steps=1))
    take_over_compilation(MixSFTConfig(**options, packing=True, max_steps=1))


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("inductor", "torch_compile: on a CPU the layers run as they are"),
        ("aot_eager", "torch_compile: under ZeRO-3 the layers run as they are"),
    ],
)
def test_where_layers_run_as_they_are_a_line_says_so(
    backend: str, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "is_deepspeed_zero3_enabled", lambda: backend == "aot_eager")
    compilation = {"torch_compile": True, "torch_compile_backend": backend}
    args = PretrainConfig(output_dir=str(tmp_path), **compilation, use_cpu=True, bf16=False, max_steps=1)
    take_over_compilation(args)
    assert not args.torch_compile and args.torch_compile_backend is None  # else the Trainer would compile the whole
    model = hybrid(0, **SHAPES)
    classes = [type(layer) for layer in model.model.layers]
    with caplog.at_level("INFO", logger="adamba"):
        compile_layers(model, args)
    assert [type(layer) for layer in model.model.layers] == classes
    assert message in caplog.text
