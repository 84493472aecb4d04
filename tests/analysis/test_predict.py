"""What is expected of a model: the counts are right, the table is Apple's, no weight is read."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from safetensors import safe_open

from mlx_llava import cli
from mlx_llava.analysis import predict as module
from mlx_llava.analysis.flops import Work
from mlx_llava.analysis.predict import ANSWER, CHIPS, Machine, mac, predict
from mlx_llava.analysis.random_model import write_random_model
from mlx_llava.checkpoint.hub import Source
from mlx_llava.model.device import on_cpu
from tests.conftest import GOLDENS, ROOT

MACHINE = Machine(encode=1e9, prefill=1e9, read=1e9, kernel=0)


@pytest.fixture(scope="module")
def coded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("coded") / "m"
    write_random_model("tiny", folder, "float16", 4)
    return folder


@pytest.fixture
def quick(monkeypatch):
    """This machine is known, and no weight can be read."""
    monkeypatch.setattr(module, "this_machine", lambda model, length: MACHINE)
    monkeypatch.setattr(mx, "load", None)


def test_the_bytes_of_a_token_are_those_of_the_file(coded, quick):
    """All of the decoder's tensors but the embedding, of which one row is read; and the cache."""
    with safe_open(coded / "model.safetensors", "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    read = sum(
        tensor.nbytes
        for name, tensor in tensors.items()
        if name.startswith("language_model.") and "embed_tokens" not in name
    )
    found = predict(Source(coded))
    config = json.loads((coded / "config.json").read_text())["text_config"]
    layers, heads, width = config["num_hidden_layers"], config["num_attention_heads"], 64
    positions = found["prompt_tokens"] + ANSWER // 2
    cached = 2 * layers * config["num_key_value_heads"] * width // heads * positions
    assert 1e9 * found["token_gb"] == pytest.approx(read + 2 * cached)
    assert 1e9 * found["weights_gb"] == pytest.approx(sum(t.nbytes for t in tensors.values()))


def test_the_operations_are_those_of_llava_1_5_7b(monkeypatch, tmp_path):
    """By hand from the published numbers of CLIP ViT-L/14-336 and Vicuna 7B."""
    from mlx_llava.analysis.flops import encode_flops, prefill_flops
    from mlx_llava.analysis.random_model import random_config

    config = random_config("7b", 32000)
    D, hidden, layers, rows, length = 4096, 11008, 32, 32064, 593
    decoder = layers * (4 * D * D + 3 * D * hidden)
    assert decoder == 6_476_005_376  # of 6.74 billion; the rest are embedding, head and norms
    attention = 4 * D * sum(range(1, length + 1))  # scores and their use, up to each
    others = 2 * D * D + 3 * D * hidden  # of the last layer: queries, output and MLP of one token
    expected = 2 * length * (decoder - others) + 2 * others + 2 * D * rows
    expected += (layers - 1) * attention + 4 * D * length
    assert prefill_flops(config, length) == pytest.approx(expected, rel=1e-3)
    width, tokens = 1024, 577
    layer = 2 * tokens * 12 * width * width + 4 * tokens * tokens * width
    projector = 2 * 576 * (width * D + D * D)
    expected = 23 * layer + 2 * 576 * 3 * 14 * 14 * width + projector
    assert encode_flops(config, 1) == pytest.approx(expected, rel=1e-6)


def test_a_calculation_is_operations_by_rates():
    work = Work(encode=6e9, prefill=1e9, token=2e9, encode_kernels=10, decoder_kernels=100)
    machine = Machine(encode=3e9, prefill=5e8, read=4e9, kernel=1e-3)
    assert machine.expect(work) == {
        "first_token": pytest.approx(2 + 2 + 0.11),
        "token": pytest.approx(0.5 + 0.1),
        "tokens_per_second": pytest.approx(1 / (0.5 + 0.1)),
    }


def test_larger_macs_are_faster():
    work = Work(encode=4e11, prefill=8e12, token=4e9, encode_kernels=276, decoder_kernels=544)
    speeds = {chip: mac(chip).expect(work) for chip in CHIPS}
    for generation in ("M1", "M2", "M3", "M4", "M5"):
        sizes = ["", " Pro", " Max", " Ultra"]
        family = [speeds[generation + size] for size in sizes if generation + size in CHIPS]
        assert len(family) >= 3
        assert sorted(family, key=lambda speed: -speed["first_token"]) == family
        assert sorted(family, key=lambda speed: speed["tokens_per_second"]) == family
    full = {chip: mac(chip).prefill / module.MAC_FLOPS / 1e12 for chip in CHIPS}
    assert full["M1"] == pytest.approx(2.6)  # as Apple says; and "over 4x" from M4 to M5
    assert full["M2"] == pytest.approx(3.6)
    assert full["M5"] == pytest.approx(4 * full["M4"])


@pytest.mark.parametrize(("chip", "published"), [("M3 Pro", 44.62), ("M4 Max", 134.5)])
def test_what_was_measured_with_mlx_lm_is_what_is_calculated(chip, published):
    """Qwen3-4B in 4 bits (docs/benchmarks.md has the sources): 36 layers, 4.02 billion weights."""
    work = Work(0, 2 * 2048 * 3.6e9, 4.02e9 * 4.5 / 8, 0, 36 * 17)
    found = mac(chip).expect(work)
    assert found["tokens_per_second"] == pytest.approx(published, rel=0.1)
    if chip == "M3 Pro":
        assert 2048 / found["first_token"] == pytest.approx(615, rel=0.15)


@pytest.mark.skipif(not on_cpu(), reason="about what a CPU computes in")
@pytest.mark.parametrize("reads_codes", [True, False])
def test_here_is_what_load_computes_in(coded, quick, reads_codes, monkeypatch):
    """On a CPU codes become float32 where they are slow to read and memory allows; scales do."""
    monkeypatch.setattr("mlx_llava.checkpoint.precision.is_read_fast", lambda _: reads_codes)
    found = predict(Source(coded))
    times = found["here"]["token_gb"] / found["token_gb"]
    assert 1 < times < 1.5 if reads_codes else times > 4
    assert found["here"]["tokens_per_second"] == pytest.approx(1 / found["here"]["token_gb"])
    kernels = 2 * 17 * module.GPU_KERNEL
    expected = found["token_gb"] / (68 * module.MAC_BANDWIDTH) + kernels
    assert found["macs"]["M1"]["token"] == pytest.approx(expected)


def test_what_cannot_fit_here_may_fit_on_a_mac(quick, monkeypatch, capsys):
    monkeypatch.setattr("mlx_llava.model.device.total_memory", lambda: 10_000)
    found = predict(Source(GOLDENS / "llava"))
    assert "0.0 GB" in found["here"]["refused"]
    assert found["macs"]["M1"]["first_token"] > 0


def test_doctor_says_what_to_expect_of_a_model(capsys):
    assert cli.main(["doctor", "--model", str(ROOT / "weights/tiny-llava")]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("tiny-llava, one picture"))
    assert lines[start].endswith("calculated from shapes and rates, not measured")
    names = [line[:10].strip() for line in lines[start + 3 :]]
    assert names == ["here", *CHIPS]


def test_doctor_writes_what_to_expect_as_json(coded, quick, capsys):
    assert cli.main(["doctor", "--json", "--model", str(coded)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["read_gb_per_second"] > 0
    assert found["expected"]["macs"].keys() == CHIPS.keys()
    assert found["expected"]["prompt_tokens"] > 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "no folder"),
        ({"model_type": "gpt2"}, "no LLaVA"),
        ({"text_config": {"num_hidden_layers": 3}}, "num_hidden_layers=3, but the checkpoint has"),
    ],
)
def test_other_checkpoints_are_refused_in_one_line(change, message, coded, tmp_path, capsys):
    folder = tmp_path / "no" / "model" / "here"
    if change:
        folder.mkdir(parents=True)
        for file in coded.iterdir():
            (folder / file.name).symlink_to(file)
        config = json.loads((coded / "config.json").read_text())
        if "text_config" in change:
            change = {"text_config": {**config["text_config"], **change["text_config"]}}
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps({**config, **change}))
    assert cli.main(["doctor", "--model", str(folder)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
