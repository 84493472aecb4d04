"""Adapters as PEFT, mlx-lm and mlx-vlm write them are read as those programs read them."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_llava.checkpoint.hub import embedded_model
from mlx_llava.convert import main as convert
from mlx_llava.fuse import main as fuse
from tests.conftest import load_as_stored as load
from tests.conftest import shared_data

torch = pytest.importorskip("torch", reason="the oracle: pip install '.[test]'")
layouts = pytest.importorskip("tests.layouts")
tiny = pytest.importorskip("tests.tiny")

from safetensors.torch import load_file, save_file  # noqa: E402

TOLERANCE = 1e-4
CASE = tiny.Case("adapters", text={"hidden_size": 64, "intermediate_size": 128})
Q_DOWN = ["q_proj", "down_proj"]
BLOCKS = r".*language_model.*(layers\.[02]\..*\.(q_proj|up_proj)|embed_tokens)"


@contextmanager
def quietly() -> Iterator[None]:
    """PEFT and transformers warn of each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def reference():
    return tiny.make_model(CASE)


@pytest.fixture(scope="module")
def base(reference, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "base"
    tiny.save(CASE, folder)
    return folder


def trained(reference, folder: Path, **settings: Any) -> Any:
    """An adapter of PEFT's with random numbers in all that it trains; returns its model."""
    # Here, as it takes two seconds to import: every process of pytest imports all tests.
    peft = pytest.importorskip("peft", reason="the oracle: pip install '.[test]'")
    with quietly():
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 12, **settings})
        model = peft.get_peft_model(copy.deepcopy(reference), config)
        torch.manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += torch.randn_like(parameter) * 0.2
        model.save_pretrained(folder)
    return model.eval()


def same_as(reference, model, processor) -> None:
    """The logits are the reference's."""
    inputs = layouts.inputs_of(processor)
    ours = np.array(model(**inputs).astype(mx.float32))
    theirs = layouts.reference_logits(reference, inputs)
    assert np.abs(ours - theirs).max() < TOLERANCE * max(1, np.abs(theirs).max())


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": Q_DOWN},
    "all-linear": {"target_modules": "all-linear"},
    "alpha_pattern": {
        "target_modules": [*Q_DOWN, "fc1", "linear_2"],
        "alpha_pattern": {"q_proj": 64, r"model.language_model.*down_proj": 2, "fc1": 3},
    },
    "rank_pattern": {
        "target_modules": Q_DOWN,
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 8, "^model.*down_proj": 2},
        "alpha_pattern": {"layers.1.mlp.down_proj": 5},
        "use_rslora": True,
    },
    "not a suffix": {"target_modules": Q_DOWN, "alpha_pattern": {"q": 99, "proj": 99}},
    "regex, embedding": {"target_modules": BLOCKS},
    "two layers": {"target_modules": ["v_proj"], "layers_to_transform": [0, 2]},
    "modules_to_save": {
        "target_modules": Q_DOWN,
        "modules_to_save": ["lm_head", "multi_modal_projector"],
    },
    "bias": {"target_modules": ["fc2", "q_proj"], "bias": "all"},
    "dora": {"target_modules": "all-linear", "use_dora": True, "fan_in_fan_out": True},
    "dora, embedding": {"target_modules": BLOCKS, "use_dora": True},
    "orthogonal": {"target_modules": Q_DOWN, "init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_peft_trains_is_what_we_load(name, reference, base, tmp_path):
    model = trained(reference, tmp_path / "lora", **SETTINGS[name])
    same_as(model, *load(base, adapter_path=tmp_path / "lora"))
    same_as(model, *load(tmp_path / "lora", base=base))


def layers_of(model) -> dict[str, np.ndarray]:
    return {k: np.array(v.astype(mx.float32)) for k, v in tree_flatten(model.parameters())}


def rewritten(source: Path, folder: Path, old: str = "", new: str = "", **settings: Any) -> Path:
    """An adapter under other names, or with other settings; None takes one away."""
    folder.mkdir()
    said = json.loads((source / "adapter_config.json").read_text()) | settings
    said = {key: value for key, value in said.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    tensors = load_file(source / "adapter_model.safetensors")
    renamed = {k.replace(old, new): t for k, t in tensors.items()} if old else tensors
    save_file(renamed, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def plain(reference, tmp_path_factory) -> Path:
    """A LoRA on the decoder's blocks."""
    folder = tmp_path_factory.mktemp("adapters") / "plain"
    trained(reference, folder, target_modules=r".*language_model.*(q_proj|down_proj)")
    return folder


@pytest.mark.parametrize(
    "spelling",
    [
        "base_model.model.language_model.model.",  # transformers 4.36 to 4.51
        "base_model.model.model.language_model.",  # from 4.52 on
        "base_model.model.model.",  # LLaVA's own
        "base_model.model.",  # the decoder alone
        "base_model.model.model.language_model.model.",
        "base_model.model.language_model.language_model.model.",
        "model.language_model.",  # without PeftModel
    ],
)
def test_adapters_under_all_names_of_the_decoder(spelling, base, plain, tmp_path):
    folder = rewritten(plain, tmp_path / "x", "base_model.model.model.language_model.", spelling)
    expected, ours = layers_of(load(plain, base=base)[0]), layers_of(load(folder, base=base)[0])
    assert all(np.array_equal(ours[name], expected[name]) for name in expected)
    before = layers_of(load(base)[0])
    assert sum(not np.array_equal(before[name], ours[name]) for name in before) == 6


def test_wrapped_names_of_what_is_trained_in_full(reference, base, tmp_path):
    """A training's own state keeps PEFT's wrappers, and what they hide."""
    trained(reference, tmp_path / "lora", **SETTINGS["modules_to_save"])
    new = ".modules_to_save.default.linear_"
    folder = rewritten(tmp_path / "lora", tmp_path / "x", ".linear_", new)
    tensors = load_file(folder / "adapter_model.safetensors")
    hidden = {k.replace(new, ".original_module.linear_"): t * 0 for k, t in tensors.items()}
    save_file({**hidden, **tensors}, folder / "adapter_model.safetensors")
    expected = layers_of(load(tmp_path / "lora", base=base)[0])
    ours = layers_of(load(folder, base=base)[0])
    assert all(np.array_equal(ours[name], expected[name]) for name in expected)


def test_an_adapter_of_a_named_kind_in_a_pickle(base, plain, tmp_path):
    """Old versions of PEFT kept the adapter's name, and wrote .bin files."""
    folder = rewritten(plain, tmp_path / "x", ".lora_A.", ".lora_A.mine.")
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    file = folder / "adapter_model.bin"
    torch.save(tensors, file)
    expected = layers_of(load(plain, base=base)[0])
    for path in (folder, file):
        ours = layers_of(load(path, base=base)[0])
        assert all(np.array_equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("settings", [SETTINGS["plain"], SETTINGS["dora, embedding"]])
def test_adapters_on_a_quantised_base(settings, reference, base, tmp_path, capsys):
    """The oracle is PEFT on the base's dequantised weights."""
    quantised, lora = str(tmp_path / "q"), tmp_path / "lora"
    arguments = ["--model", str(base), "--mlx-path", quantised, "-q", "--q-group-size", "32"]
    assert convert(arguments) == 0
    assert convert(["--model", quantised, "--mlx-path", str(tmp_path / "p"), "-d"]) == 0
    with quietly():
        dequantised = type(reference).from_pretrained(tmp_path / "p").eval()
    model = trained(dequantised, lora, **settings)
    ours, processor = load(quantised, adapter_path=lora)
    same_as(model, ours, processor)
    assert isinstance(ours.language_model.model.layers[1].mlp.gate_proj, nn.QuantizedLinear)
    with pytest.warns(UserWarning, match=r"quantised layers became plain; --model .*/q --adapter-"):
        same_as(model, *load(lora, base=quantised))
    fused = str(tmp_path / "fused")
    assert fuse(["--model", quantised, "--adapter-path", str(lora), "--output", fused]) == 0
    assert "quantised layers became plain" in capsys.readouterr().err
    same_as(model, *load(fused))
    converted = str(tmp_path / "converted")
    assert convert(["--model", str(lora), "--base", quantised, "--mlx-path", converted]) == 0
    same_as(model, *load(converted))


def mlx_adapter(folder: Path, base: Path, keys: set[str], config: dict, dora: bool = False):
    """What mlx-lm trains and saves; returns its model, whose layers are mlx-lm's own."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, processor = load(base)
    decoder = model.language_model
    decoder.freeze()
    settings = {"rank": 4, "scale": 3.0, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(decoder, 2, settings, use_dora=dora)
    noisy = [
        (name, array + mx.random.normal(array.shape) * 0.2)
        for name, array in tree_flatten(decoder.trainable_parameters())
    ]
    decoder.load_weights(noisy, strict=False)
    model.eval()
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(noisy))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return model, processor


MLX = {"model": "base", "num_layers": 2, "lora_parameters": {"rank": 4, "scale": 3.0}}
BLOCK_KEYS = {"self_attn.q_proj", "mlp.down_proj"}


@pytest.mark.parametrize(
    ("keys", "kind", "prefix"),
    [
        (BLOCK_KEYS, "lora", ""),  # mlx-lm, on a text model
        (BLOCK_KEYS, "lora", "language_model."),  # mlx-vlm
        (BLOCK_KEYS | {"model.embed_tokens", "lm_head"}, "lora", ""),
        (BLOCK_KEYS | {"model.embed_tokens"}, "dora", ""),
    ],
)
def test_adapters_of_mlx_lm_and_mlx_vlm(keys, kind, prefix, base, tmp_path):
    config = {**MLX, "fine_tune_type": kind}
    theirs, processor = mlx_adapter(tmp_path / "lora", base, keys, config, kind == "dora")
    file = tmp_path / "lora" / "adapters.safetensors"
    mx.save_safetensors(str(file), {prefix + k: v for k, v in mx.load(str(file)).items()})
    inputs = layouts.inputs_of(processor)
    expected = np.array(theirs(**inputs))
    fused = str(tmp_path / "fused")
    assert fuse(["--model", str(base), "--adapter-path", str(file.parent), "--output", fused]) == 0
    for ours, _ in (
        load(base, adapter_path=file.parent),
        load(file.parent, base=base),
        load(fused),
    ):
        assert np.abs(np.array(ours(**inputs)) - expected).max() < TOLERANCE * expected.max()


def test_adapters_of_old_mlx_vlm_say_how_they_are_read(base, tmp_path):
    config = {"rank": 4, "alpha": 12, "dropout": 0.1}
    theirs, processor = mlx_adapter(tmp_path / "lora", base, BLOCK_KEYS, config)
    file = tmp_path / "lora" / "adapters.safetensors"
    old = {
        k.replace("lora_a", "A").replace("lora_b", "B"): v for k, v in mx.load(str(file)).items()
    }
    mx.save_safetensors(str(file), {f"language_model.{k}": v for k, v in old.items()})
    inputs = layouts.inputs_of(processor)
    with pytest.warns(
        UserWarning, match=r'alpha / rank = 3, .* write "scale": 12 into adapter_conf'
    ):
        ours = load(base, adapter_path=file.parent)[0]
    expected = np.array(theirs(**inputs))
    assert np.abs(np.array(ours(**inputs)) - expected).max() < TOLERANCE * expected.max()
    (file.parent / "adapter_config.json").write_text(json.dumps({**config, "scale": 3.0}))
    load(base, adapter_path=file.parent)
    endless = json.dumps({**config, "scale": float("inf")})
    (file.parent / "adapter_config.json").write_text(endless)
    with pytest.raises(ValueError, match="the scale inf, expected a finite number"):
        load(base, adapter_path=file.parent)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "IA3"}, "peft_type='IA3'; mlx_llava reads LORA"),
    ({"peft_type": "ADALORA"}, "peft_type='ADALORA'"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4', which changes"),
    ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
    ({"use_dora": True}, "says use_dora, but .* has no lora_magnitude_vector"),
    ({"layer_replication": [[0, 2]]}, r"layer_replication=\[\[0, 2\]\], which mlx_llava does not"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"r": 8}, "the rank 8, but its matrices have 4"),
    ({"rank_pattern": {"q_proj": 2}}, "the rank 2, but its matrices have 4"),
    ({"alpha_pattern": {"(": 2}}, r"has the pattern '\('"),
    ({"lora_alpha": "many"}, "value of the wrong kind"),
    ({"lora_alpha": float("nan")}, "the scale nan, expected a finite number"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[str(s) for s, _ in REFUSED])
def test_other_adapters_are_refused_by_name(settings, message, base, plain, tmp_path):
    folder = rewritten(plain, tmp_path / "x", **settings)
    for arguments in (
        {"path_or_repo": base, "adapter_path": folder},
        {"path_or_repo": folder, "base": base},
    ):
        with pytest.raises(ValueError, match=message):
            load(**arguments)


def test_an_adapter_beside_plain_layers_is_not_shared_and_says_so(base, plain):
    two = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    with pytest.raises(ValueError, match=r"An adapter beside the layers cannot be shared by"):
        load(base, adapter_path=plain, group=two)


def test_what_is_no_whole_adapter_is_said_in_one_line(base, plain, tmp_path):
    torn = rewritten(plain, tmp_path / "torn")
    (torn / "adapter_config.json").unlink()
    for arguments in (
        {"path_or_repo": base, "adapter_path": torn},
        {"path_or_repo": torn, "base": base},
    ):
        with pytest.raises(FileNotFoundError, match="no adapter_config.json that says how strong"):
            load(**arguments)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        load(base, adapter_path=tmp_path / "gone")
    with pytest.raises(
        ValueError, match=r"is a LoRA; give .* --base \(adapter_config.json names x/y"
    ):
        load(rewritten(plain, tmp_path / "named", base_model_name_or_path="x/y"))
    half = rewritten(plain, tmp_path / "half", "q_proj.lora_B", "k_proj.lora_B")
    with pytest.raises(ValueError, match="has only [AB] of the two matrices of language_model"):
        load(half, base=base)
    elsewhere = rewritten(plain, tmp_path / "elsewhere", "layers.2", "layers.9")
    with pytest.raises(ValueError, match=r"changes .*layers.9.* which the base does not have"):
        load(base, adapter_path=elsewhere)
    odd = rewritten(plain, tmp_path / "odd", ".lora_B.weight", ".lora_B.bias")
    with pytest.raises(ValueError, match="is no part of a LoRA"):
        load(base, adapter_path=odd)
    for old, new, message in (
        (".lora_A.", ".lora_A.mine.", "are of two adapters"),
        ("base_model.model.model.language_model.layers.1", "model.layers.1", "under two names"),
    ):
        folder = rewritten(plain, tmp_path / message)
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        save_file(tensors | {k.replace(old, new): t.clone() for k, t in tensors.items()}, file)
        with pytest.raises(ValueError, match=message):
            load(base, adapter_path=folder)
    new = rewritten(plain, tmp_path / "new", use_tomorrow=True)
    with pytest.warns(UserWarning, match="keys that are not read: use_tomorrow"):
        load(base, adapter_path=new)


def test_a_whole_model_with_the_config_of_its_adapter_is_whole(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "x")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    expected, ours = layers_of(load(base)[0]), layers_of(load(folder)[0])
    assert all(np.array_equal(ours[name], expected[name]) for name in expected)


def test_an_embedding_that_is_the_output_layer_too_is_not_changed_alone(tmp_path):
    tied = tiny.Case("tied", text={"tie_word_embeddings": True}, top={"tie_word_embeddings": True})
    with quietly():
        model = tiny.save(tied, tmp_path / "base")
    trained(model, tmp_path / "lora", target_modules=["embed_tokens"])
    for arguments in (
        {"path_or_repo": tmp_path / "base", "adapter_path": tmp_path / "lora"},
        {"path_or_repo": tmp_path / "lora", "base": tmp_path / "base"},
    ):
        with pytest.raises(ValueError, match="which is the base's output layer too"):
            load(**arguments)


REPORTS = {"alpha_pattern": (16, 4), "rank_pattern": (2, 4)}


@pytest.mark.parametrize("name", REPORTS)
def test_reported_patterns_have_pefts_strength(name, tmp_path):
    folder = shared_data(f"reports/lora_patterns/{name}")
    case = layouts.case()
    reference = tiny.make_model(case)
    state = layouts.state_dict(reference)
    llama = layouts.tuned_llama(state)
    llama |= {k: t for k, t in layouts.to_original(state).items() if "mm_projector" in k}
    base = layouts.write_folder(tmp_path / "base", llama, {"model_type": "llama"})
    clip = layouts.write_clip(tmp_path / "clip", state, reference)
    ours = layers_of(load(folder, base=base, vision_tower=clip)[0])
    pairs = load_file(folder / "adapter_model.safetensors")
    for module, scale in zip(("self_attn.q_proj", "mlp.down_proj"), REPORTS[name], strict=True):
        path = f"model.layers.1.{module}"
        a, b = (pairs[f"base_model.model.{path}.lora_{x}.weight"] for x in "AB")
        change = ours[f"language_model.{path}.weight"] - llama[f"{path}.weight"].numpy()
        assert np.abs(change - scale * (b @ a).numpy()).max() < 1e-4


def test_the_reported_adapter_on_a_llava_hf_base():
    folder = shared_data("reports/peft_on_llava_hf/plain")
    before, after = layers_of(load()[0]), layers_of(load(folder, base=embedded_model())[0])
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    assert len(changed) == 8
