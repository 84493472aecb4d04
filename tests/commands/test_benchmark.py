"""The benchmark: it runs, its counts are right, and its random models are as trained ones."""

from __future__ import annotations

import json
import subprocess
import sys

import mlx.core as mx
import pytest

from mlx_llava import load
from mlx_llava.analysis import random_model
from mlx_llava.analysis.flops import decode_bytes, encode_flops, prefill_flops
from mlx_llava.analysis.measure import draw_pictures
from mlx_llava.benchmark import main
from mlx_llava.files import check_output
from mlx_llava.model.cache import nbytes
from mlx_llava.model.quantized import is_quantized, plain_weight
from mlx_llava.model.vision_config import CLIP, SIGLIP
from tests.conftest import ROOT

SMALL = ["--shape", "tiny", "--batch", "1,2", "--images", "1,2", "--repeats", "1", "-m", "4"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random") / "tiny"
    random_model.write_random_model("tiny", folder, "float32")
    return folder


def test_it_measures_every_part(tmp_path, capsys):
    out, plot = tmp_path / "measured.json", tmp_path / "measured.png"
    more = ["--requests", "30", "--dtype", "float32", "--q-bits", "4"]
    assert main([*SMALL, *more, "--out", str(out), "--plot", str(plot)]) == 0
    found = json.loads(out.read_text())
    assert found["q_bits"] == 4
    alone = found["alone"]
    assert [row["images"] for row in alone["single"]] == [1, 2]
    for row in alone["single"]:
        parts = [row[name]["median"] for name in ("preprocess", "encode", "prefill")]
        assert row["first"]["median"] == pytest.approx(sum(parts))
        assert all(0 < share < 1 for share in row["of_the_machine"].values())
    assert {(row["batch"], row["images"]) for row in alone["batches"]} == {
        (batch, images) for batch in (1, 2) for images in (1, 2)
    }
    assert [row["prompt_tokens"] for row in alone["contexts"]] == [64, 256, 1024]
    assert alone["start"]["median"] > alone["load"]
    assert alone["growth"]["growth"] < 0.2
    assert alone["follow_up"]["ratio"]["median"] > 0
    assert found["machine"]["versions"]["mlx"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    for path in (out, plot):
        check_output(path, "mlx_llava.benchmark")
    printed = capsys.readouterr().out
    assert ", 4 bits, 4 tokens" in printed
    assert "follow-up question: first token in" in printed
    assert "rows  images  seconds  tokens/s" in printed


@pytest.mark.parametrize("option", ["--out", "--plot"])
def test_nothing_but_its_own_figures_is_written_over(option, tmp_path, capsys):
    mine = tmp_path / "mine.png"
    mine.write_text('{"model": "mine"}')
    assert main([*SMALL, option, str(mine)]) == 2
    assert "mlx_llava.benchmark did not write it" in capsys.readouterr().err
    assert mine.read_text() == '{"model": "mine"}'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-tokens", "1"], "--max-tokens must be at least 2"),
        (["--repeats", "0"], "--repeats at least 1"),
        (["--q-bits", "4"], "--q-bits belongs to --shape"),
        (["--shape", "tiny", "--q-bits", "7"], "no codes of 7 bits; known: 2, 3, 4, 5, 6, 8"),
        (["--model", "no/where/at-all"], "no/where/at-all"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", [CLIP, SIGLIP])
def test_counts_of_multiplications_and_bytes(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_llava.model.linux.functions.NUMPY", False)  # blocks make no calls
    vision, text = random_model.SHAPES["tiny"]
    shape = {**vision, "model_type": kind, "image_size": 60}, text
    monkeypatch.setitem(random_model.SHAPES, "tiny", shape)
    random_model.write_random_model("tiny", tmp_path / "tiny", "float32")
    model, processor = load(tmp_path / "tiny", dtype="float32")
    assert type(model.vision_tower.vision_model).__module__.endswith(kind.split("_")[0])
    counted = 0
    layers = [module for module in model.modules() if hasattr(module, "attention")]
    attention = layers[0].attention

    def count_calls(kind, method):
        call = getattr(kind, method)

        def count(self, x):
            nonlocal counted
            counted += 2 * x.size * len(self.weight)
            return call(self, x)

        monkeypatch.setattr(kind, method, count)

    def count_attention(queries, keys, values, *, scale, mask=None):
        nonlocal counted
        share = 0.5 if mask == "causal" else 1
        counted += 4 * share * queries.size * keys.shape[2]
        return attention(queries, keys, values, scale=scale, mask=mask)

    tower = model.vision_tower.vision_model
    count_calls(type(tower.embeddings.patch_embedding), "project")
    count_calls(type(model.language_model.lm_head), "__call__")
    for layer in layers:
        monkeypatch.setattr(layer, "attention", count_attention)
    inputs = processor("<image>What? <image>", draw_pictures(tmp_path, 2))
    embeddings = model.embed(**inputs)
    assert counted == pytest.approx(encode_flops(model.config, 2), rel=1e-6)
    counted, cache = 0, model.language_model.make_cache()
    model.language_model(input_embeddings=embeddings, cache=cache, last_only=True)
    length = embeddings.shape[1]
    assert counted == pytest.approx(prefill_flops(model.config, length), rel=1e-6)
    head = model.language_model.lm_head.weight.nbytes
    assert decode_bytes(model, cache[0].keys.shape[2]) - nbytes(cache) > head


@pytest.mark.parametrize("shape", random_model.SHAPES)
def test_shapes_are_configs(shape):
    config = random_model.random_config(shape, 3)
    assert config.vision_config.patches_per_side in (4, 24, 27)
    with pytest.raises(ValueError, match="no shape '13b'; known: tiny, 300m, 0.5b, 1b, 7b"):
        random_model.random_config("13b", 3)


def test_the_profile_names_the_parts(tiny):
    command = [sys.executable, "scripts/profile_layers.py", "--model", str(tiny), "--tokens", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for part in ("encode: ", "prefill: ", "3 tokens: ", "matmul", "attention", "norm", "gate"):
        assert part in done.stdout


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("float32", None), ("float16", None), ("bfloat16", None), ("float32", 3), ("bfloat16", 8)],
)
def test_random_weights_keep_activations_of_one_size(dtype, bits, tmp_path):
    """Also those that are codes."""
    random_model.write_random_model("tiny", tmp_path / "m", dtype, bits)
    model, processor = load(tmp_path / "m", as_stored=True)
    assert model.language_model.dtype == getattr(mx, dtype)
    layer = model.language_model.layers[0].self_attn.q_proj
    weight = plain_weight(layer).astype(mx.float32)
    assert is_quantized(layer) == bool(bits)
    assert (model.config.quantization or {}).get("bits") == bits
    assert mx.std(weight).item() * 8 == pytest.approx(1, abs=0.1)  # of 64 inputs
    assert abs(mx.mean(weight).item()) < 0.02
    logits = model(**processor("<image>What?", draw_pictures(tmp_path, 1)))
    assert 0.5 < mx.std(logits.astype(mx.float32)).item() < 2


@pytest.mark.parametrize("bits", [None, 4])
def test_a_random_model_is_written_in_a_fraction_of_its_size(bits, tmp_path):
    """No tensor is ever in memory in more than its own bits, and no two at once."""
    code = (
        "import resource, sys; from pathlib import Path; import mlx.core as mx;"
        "from mlx_llava.analysis import random_model as r; _, text = r.SHAPES['tiny'];"
        "text.update(hidden_size=256, num_attention_heads=8, intermediate_size=8192);"
        "text.update(num_hidden_layers=16);"
        f"r.write_random_model('tiny', Path(sys.argv[1]), 'float16', {bits});"
        "print(mx.get_peak_memory())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "m")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    embedding = 32064 * 256 * (2 if bits is None else 0.5)
    assert size > 5 * embedding
    assert int(done.stdout) < 4 * embedding
