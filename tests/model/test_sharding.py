"""Several ranks answer as one process does: parts of every layer, or some of the layers each.

All models of one number of ranks are asked in one group of processes (rank.py).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle: pip install '.[test]'")
tiny = pytest.importorskip("tests.tiny")

from mlx_llava.checkpoint.convert import Quantization, convert  # noqa: E402
from mlx_llava.model import pipeline  # noqa: E402
from mlx_llava.model.config import LlavaConfig  # noqa: E402
from mlx_llava.model.crossing import pipelined_step, sharded_step, tiles_step  # noqa: E402
from mlx_llava.model.sharding import check_sharding, cut, is_cut  # noqa: E402
from mlx_llava.model.text_config import TextConfig  # noqa: E402
from tests.conftest import MACHINES, as_on, load_as_stored  # noqa: E402
from tests.model.rank import CHUNK, held, observe  # noqa: E402
from tests.ranks import launched  # noqa: E402

TOLERANCE = 1e-5
#: What 2, 3 and 4 ranks can share, by heads as well as by layers, and as codes too.
WIDE = {
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 32,
}
BIASES = {"attention_bias": True, "mlp_bias": True}
CASES = {
    case.name: case
    for case in (
        *tiny.CASES,
        tiny.Case("wide", text={**WIDE, **BIASES}, images=(2, 0, 1)),
        tiny.Case("wide_next", next=True, text={**WIDE, "num_key_value_heads": 3}, images=(3, 1)),
    )
}


@dataclass(frozen=True)
class Job:
    """A model that so many ranks share in some way.

    Attributes:
        bits: of its codes, if it has codes.
        machine: as on which one they compute.
        whole: they answer several prompts at once, and one that goes on.
        count: what crosses between them is counted.
    """

    size: int
    name: str
    how: dict[str, Any] = field(default_factory=dict)
    bits: int | None = None
    machine: str = "mac"
    whole: bool = False
    count: bool = False

    @property
    def is_slow(self) -> bool:
        """Whether it is left out: ranks wait at full speed for the others, on two cores."""
        return self.size > 3 or (self == Job(2, self.name) and self.name not in COMMON)

    def __str__(self) -> str:
        how = [f"{key}={value}" for key, value in self.how.items()]
        more = [name for name in ("whole", "count") if getattr(self, name)]
        parts = (self.size, self.name, self.bits or "float32", self.machine, *how, *more)
        return "-".join(map(str, parts))


#: One of each decoder: what is before it is the same where ranks have some of the layers each.
DECODERS = {f"{case.family} {case.text}": case for case in tiny.CASES}.values()
#: Of which two ranks always share the layers; they are one of each decoder and each kind of images.
COMMON = {"gqa", "siglip", "next_three_images", "onevision", *(case.name for case in DECODERS)}
LAYERS = {"pipeline": True}
JOBS = (
    *(Job(2, case.name) for case in tiny.CASES),
    *(
        Job(2, case.name, {"split": [case.text.get("num_hidden_layers", 3) - 1, 1]})
        for case in DECODERS
    ),
    *(
        Job(2, "wide", how, bits, machine, whole=not bits or (bits == 4 and machine == "mac"))
        for how, bits, machine in product(({}, LAYERS), (None, 4, 8), MACHINES)
    ),
    *(Job(2, "next_three_images", how, whole=True) for how in ({}, {"split": [1, 2]})),
    Job(3, "next_three_images", LAYERS),
    Job(3, "gqa"),
    Job(3, "wide", LAYERS, machine="linux", whole=True),
    Job(3, "wide", LAYERS, 4),
    Job(3, "wide", {}, 4, machine="linux"),
    Job(3, "wide_next"),
    Job(4, "gqa"),
    Job(4, "next_llama3"),
    Job(4, "gqa", LAYERS),
    Job(4, "wide", {}, 8),
    Job(4, "wide_next", {"split": [1, 2, 1, 1]}),
    *(Job(size, "wide", how, count=True) for size in (2, 3) for how in ({}, LAYERS)),
)
REFUSED = {
    "3-gqa-float32-mac": "3 ranks cannot share 4 heads; 2, 4 ranks could, or use --pipeline.",
    "4-gqa-float32-mac-pipeline=True": "4 ranks cannot have 1, 1, 1, 1 layers; the model has 3, "
    "and each rank needs one or more.",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory, written) -> Callable[[Job], list[dict[str, Any]]]:
    """Gives what every rank finds in a job; all of as many ranks are done together."""
    folder = tmp_path_factory.mktemp("ranks")

    @cache
    def made(name: str, bits: int | None) -> Path:
        plain, _ = written(CASES[name])
        return _make(folder / f"{name}-{bits}", plain, name, bits)

    @cache
    def together(size: int, is_slow: bool) -> dict[str, list[dict[str, Any]]]:
        own = [job for job in JOBS if (job.size, job.is_slow) == (size, is_slow)]
        asked = [{**asdict(job), "folder": str(made(job.name, job.bits))} for job in own]
        (folder / f"jobs-{size}.json").write_text(json.dumps(asked))
        with launched("-m", "tests.model.rank", str(folder), size=size) as ranks:
            ended = [(rank.communicate(timeout=300), rank.returncode) for rank in ranks]
        assert not any(code for _, code in ended), ended
        read = [(folder / f"{rank}-of-{size}.json").read_text() for rank in range(size)]
        each = zip(*map(json.loads, read), strict=True)
        return {str(job): list(ranks) for job, ranks in zip(own, each, strict=True)}

    return lambda job: together(job.size, job.is_slow)[str(job)]


def _make(folder: Path, plain: Path, name: str, bits: int | None) -> Path:
    """A checkpoint, what it is asked, and what one process alone answers."""
    if bits is None:
        shutil.copytree(plain, folder)
    else:
        recipe = "mixed_4_6" if bits == 4 else None  # layers of more bits than others
        convert(
            plain, folder, quantization=Quantization(None if recipe else bits, 32, recipe=recipe)
        )
    prompts, pictures = tiny.rows(CASES[name])
    (folder / "prompts.json").write_text(json.dumps(prompts))
    for row, images in enumerate(pictures):
        for i, image in enumerate(images):
            image.save(folder / f"{row}-{i}.png")
    model, processor = load_as_stored(folder)
    whole = any(job.whole for job in JOBS if (job.name, job.bits) == (name, bits))
    for machine in MACHINES if name == "wide" else ("mac",):
        with as_on(machine):
            seen = observe(model, processor, folder, whole)
        np.save(folder / f"{machine}.npy", seen.pop("logits"))
        (folder / f"{machine}.json").write_text(json.dumps({**seen, "held": held(model)}))
    return folder


def marked(job: Job) -> Any:
    return pytest.param(job, marks=pytest.mark.slow if job.is_slow else (), id=str(job))


@pytest.mark.parametrize("job", [marked(job) for job in JOBS if not job.count])
def test_several_ranks_answer_as_one(job, found):
    if refused := REFUSED.get(str(job)):
        assert found(job) == [{"refused": refused}] * job.size
        return
    for rank in found(job):
        assert rank["differ"] == []
        assert rank["error"] < TOLERANCE


@pytest.mark.parametrize("how", [{}, LAYERS], ids=["sharded", "pipeline"])
@pytest.mark.parametrize("bits", [None, 4])
def test_a_rank_holds_its_part(bits, how, found):
    """Of every layer's weights, beside norms and biases, or of the layers."""
    ranks = found(Job(2, "wide", how, bits, whole=True))
    whole = ranks[0]["whole"]
    assert sum(rank["held"] for rank in ranks) == pytest.approx(whole, rel=0.02 if not how else 0)
    assert all(rank["held"] <= 0.61 * whole for rank in ranks)


@pytest.mark.parametrize("job", [job for job in JOBS if job.count], ids=str)
def test_what_crosses_is_what_arithmetic_says(job, found, monkeypatch):
    monkeypatch.setattr(pipeline, "CHUNK", CHUNK)
    config = LlavaConfig.from_dict(CASES["wide"].config().to_dict())
    for rank, result in enumerate(found(job)):
        images, prefill, *steps = result["crosses"]
        tokens, sends = prefill.pop("tokens"), rank < job.size - 1
        expected = [tiles_step(config, 2, job.size, 4)]
        for n, rows in ((tokens, 1), (1, 1), (3, 3)):
            text = config.text_config
            pipelined = pipelined_step(text, n, 4, rows, sends)
            expected.append(pipelined if job.how else sharded_step(text, n, 4, rows))
        for counts, one in zip((images, prefill, *steps), expected, strict=True):
            assert (counts.pop("bytes"), sum(counts.values())) == (one.nbytes, one.times)


VICUNA_7B = TextConfig()
VICUNA_13B = TextConfig(
    hidden_size=5120, intermediate_size=13824, num_attention_heads=40, num_hidden_layers=40
)
YI_34B = TextConfig(
    hidden_size=7168,
    intermediate_size=20480,
    num_attention_heads=56,
    num_key_value_heads=8,
    num_hidden_layers=60,
)
CODES = {"bits": 4, "group_size": 64}


@pytest.mark.parametrize(
    ("config", "quantization", "sizes"),
    [
        (VICUNA_7B, None, [2, 4, 8, 16, 32]),
        (VICUNA_7B, CODES, [2, 4]),
        (VICUNA_13B, CODES, [2, 4, 8]),
        (YI_34B, CODES, [2, 4, 8]),
        (replace(VICUNA_7B, num_key_value_heads=1), CODES, [2, 4]),
    ],
)
def test_sizes_that_work_are_named(config, quantization, sizes):
    for size in sizes:
        check_sharding(config, quantization, size)
    for size in {*range(2, 33)} - {*sizes}:
        with pytest.raises(ValueError, match=f"^{size} ranks cannot share .*; {sizes[0]}, "):
            check_sharding(config, quantization, size)


SMALL = TextConfig(hidden_size=64, intermediate_size=192, num_attention_heads=4, head_dim=64)


@pytest.mark.parametrize(
    ("config", "quantization", "size", "message"),
    [
        (
            SMALL,
            CODES,
            2,
            "3 quantisation groups of language_model.model.layers.0.mlp.down_proj; no",
        ),
        (SMALL, {**CODES, "group_size": 32}, 2, None),
        (SMALL, None, 3, "4 heads; 2, 4 ranks could"),
        (replace(SMALL, num_attention_heads=6, num_key_value_heads=3), None, 2, "3 heads of keys"),
        (replace(SMALL, intermediate_size=6), None, 4, "6 hidden units; 2 ranks could, or use --p"),
    ],
)
def test_what_does_not_divide_is_named(config, quantization, size, message):
    if message is None:
        check_sharding(config, quantization, size)
    else:
        with pytest.raises(ValueError, match=message):
            check_sharding(config, quantization, size)


def test_a_layer_that_is_not_quantised_has_no_groups_to_divide():
    layers = {f"language_model.model.layers.{i}.mlp.down_proj": False for i in range(32)}
    check_sharding(SMALL, {**CODES, **layers, "group_size": 32}, 2)
    check_sharding(replace(SMALL, intermediate_size=100), {**CODES, "group_size": 32}, 2)


def parts_of(name: str, array: mx.array, kv_heads: int = 6) -> list[mx.array]:
    name = f"language_model.model.layers.0.{name}"
    assert is_cut(name)
    return [cut(name, array, kv_heads, rank, size=6) for rank in range(6)]


def test_parts_are_the_whole():
    array = mx.arange(24 * 12).reshape(24, 12)
    for name in ("mlp.up_proj.weight", "self_attn.k_proj.scales"):
        assert mx.array_equal(mx.concatenate(parts_of(name, array)), array)
    for name in ("mlp.down_proj.weight", "self_attn.o_proj.biases"):
        assert mx.array_equal(mx.concatenate(parts_of(name, array), axis=1), array)
    assert mx.array_equal(
        mx.concatenate(parts_of("self_attn.q_proj.bias", array[:, 0])), array[:, 0]
    )
    assert mx.array_equal(sum(parts_of("self_attn.o_proj.bias", array[:, 0])), array[:, 0])
    assert not is_cut("vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight")


def test_fewer_heads_of_keys_and_values_than_ranks_are_several_ranks_own():
    array = mx.arange(24 * 12).reshape(24, 12)
    parts = parts_of("self_attn.v_proj.weight", array, kv_heads=2)
    assert all(mx.array_equal(part, array[:12]) for part in parts[:3])
    assert all(mx.array_equal(part, array[12:]) for part in parts[3:])


def test_permuted_inputs_are_whole_or_refused():
    order = mx.arange(12)
    name = "self_attn.q_proj.input_permutation"
    assert all(mx.array_equal(part, order) for part in parts_of(name, order))
    with pytest.raises(ValueError, match="is of GPTQ's act-order.*; use --pipeline"):
        parts_of("mlp.down_proj.input_permutation", order)


@pytest.mark.parametrize(
    ("memory", "whole", "split"),
    [
        ([16, 16], 2, [16, 16]),
        ([34, 18], 2, [21, 11]),
        ([64, 2, 16], 2, [25, 1, 6]),
        ([1, 1, 1], 2, [11, 11, 10]),
    ],
)
def test_layers_are_split_by_memory(memory, whole, split):
    assert pipeline.split_layers(32, memory, whole) == split


@pytest.mark.parametrize("split", [[16, 15], [32], [33, -1], [32, 0], [11, 11, 10]])
def test_a_split_gives_every_layer_a_rank_and_every_rank_a_layer(split):
    pipeline.check_split(32, [20, 12], 2)
    with pytest.raises(ValueError, match="layers; the model has 32, and each rank needs one"):
        pipeline.check_split(32, split, 2)
