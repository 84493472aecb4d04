"""16 bits and codes, as a Mac computes them, give transformers' logits and tokens.

The bound of 16 bits is transformers' own distance from float32 on the same weights and inputs: two
computations that are both as near to it lie at most twice that distance apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle: pip install '.[test]'")
hf = pytest.importorskip("transformers")
tiny = pytest.importorskip("tests.tiny")

from mlx_llava import convert  # noqa: E402
from mlx_llava.checkpoint.convert import Quantization  # noqa: E402
from mlx_llava.generation.batch import BatchGenerator, run  # noqa: E402
from mlx_llava.generation.sampling import Options  # noqa: E402
from mlx_llava.model.device import on_cpu  # noqa: E402
from tests.conftest import as_on  # noqa: E402
from tests.conftest import load_as_stored as load  # noqa: E402

STEPS = 6


@pytest.fixture(autouse=True)
def mac():
    with as_on("mac"):
        yield


def as_float(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))


def logits_of(reference, batch) -> np.ndarray:
    if "pixel_values" in batch:
        batch = {**batch, "pixel_values": batch["pixel_values"].to(reference.dtype)}
    with torch.no_grad():
        return reference(**batch).logits.float().numpy()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return torch.log_softmax(torch.tensor(logits), -1).numpy()


def answer(model, processor, rows) -> tuple[np.ndarray, np.ndarray]:
    """Answers in a batch: ids (B, STEPS), and the log-probabilities they were chosen from."""
    processor.eos_ids = frozenset()
    generator = BatchGenerator(model, processor)
    for row in rows:
        generator.insert(processor(*row, raw=True), Options(max_tokens=STEPS))
    steps = {uid: [] for uid in range(len(rows))}
    for uid, response in run(generator):
        steps[uid].append((response.token, as_float(response.logprobs)))
    ids, logprobs = zip(*(zip(*row, strict=True) for row in steps.values()), strict=True)
    return np.array(ids), np.array(logprobs)


def say_again(model, processor, row, ids: np.ndarray) -> np.ndarray:
    """The logits (STEPS, V) behind one row's answer, alone and with a cache."""
    decoder = model.language_model
    cache = decoder.make_cache()
    prompt = model.embed(**processor(*row, raw=True))
    steps = [decoder(input_embeddings=prompt, cache=cache, last_only=True)]
    steps += [decoder(mx.array([[token]]), cache=cache) for token in ids[:-1].tolist()]
    return as_float(mx.concatenate(steps, axis=1)[0])


class Computed:
    """What we compute of a case, and where it is in transformers' logits.

    Attributes:
        batch: prompts and what we answered, for transformers.
        ours: of the prompts; of the answers in a batch, as log-probabilities; of the first
            answer alone.
        ids: of the answers in a batch.
    """

    def __init__(self, case, model, processor) -> None:
        prompts, pictures = tiny.rows(case)
        rows = list(zip(prompts, pictures, strict=True))
        ids, logprobs = answer(model, processor, rows)
        placeholders = ids == model.config.image_token_index
        # After a placeholder, transformers would wait for one more picture.
        told = np.cumsum(placeholders, axis=1) - placeholders == 0
        self.batch = tiny.reference_inputs(case)
        L = self.batch["input_ids"].shape[1]
        seen = self.batch["attention_mask"].numpy() > 0
        said = torch.tensor(np.where(placeholders, 0, ids)[:, :-1])
        for name, new in (("input_ids", said), ("attention_mask", torch.ones_like(said))):
            self.batch[name] = torch.cat([self.batch[name], new], dim=1)
        logits = model(**processor(prompts, pictures, raw=True))
        assert logits.dtype == model.language_model.dtype
        again = say_again(model, processor, rows[0], ids[0])
        self.ids = ids[told]
        self.ours = [as_float(logits)[seen], logprobs[told], again[told[0]]]
        self._places: list[Callable[[np.ndarray], np.ndarray]] = [
            lambda theirs: theirs[:, :L][seen],
            lambda theirs: log_softmax(theirs[:, L - 1 :])[told],
            lambda theirs: theirs[0, L - 1 :][told[0]],
        ]

    def theirs(self, reference) -> list[np.ndarray]:
        logits = logits_of(reference, self.batch)
        return [place(logits) for place in self._places]


def check_16_bits(computed: Computed, reference, times: int = 2) -> None:
    """Compares with transformers in 16 bits, by its own distance from float32."""
    theirs, exact = computed.theirs(reference), copy.deepcopy(reference).float()
    errors = [a - b for a, b in zip(theirs, computed.theirs(exact), strict=True)]
    for ours, expected, error in zip(computed.ours, theirs, errors, strict=True):
        assert np.linalg.norm(ours - expected) < times * np.linalg.norm(error)
    second, first = np.sort(theirs[1])[:, -2:].T
    sure = first - second > times * np.abs(errors[1]).max()
    assert (computed.ids == theirs[1].argmax(-1))[sure].all()


def marked(case: tiny.Case, dtype: str) -> Any:
    """A case in a dtype, slow in one of two: each of them in turn."""
    is_slow = (dtype == "float16") == bool(tiny.CASES.index(case) % 2)
    marks = pytest.mark.slow if is_slow else ()
    return pytest.param(case, dtype, marks=marks, id=f"{case.name}-{dtype}")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [marked(*pair) for pair in product(tiny.CASES, ("float16", "bfloat16"))],
)
def test_16_bits_are_as_near_as_transformers_own(case, dtype, written) -> None:
    folder, whole = written(case)
    model, processor = load(folder, dtype=dtype)
    assert model.vision_tower.dtype == model.language_model.dtype == getattr(mx, dtype)
    reference = tiny.in_dtype(copy.deepcopy(whole), getattr(torch, dtype))
    check_16_bits(Computed(case, model, processor), reference)


TEXT = {"hidden_size": 32, "intermediate_size": 64}
TOWER = {**TEXT, "num_attention_heads": 2}
BIASES = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
GQA = tiny.Case("gqa", text=TEXT, vision=TOWER)
TIED = tiny.Case("biases_tied", text={**TEXT, **BIASES}, vision=TOWER)
NEXT = tiny.Case("next", True, family="mistral", text={**TEXT, "sliding_window": 40}, vision=TOWER)

QWEN_TEXT = {**TEXT, "tie_word_embeddings": True}
QWEN = tiny.Case("qwen2", family="qwen2", text=QWEN_TEXT, vision=TOWER)
PHI = tiny.Case("phi3", family="phi3", text={**TEXT, **tiny.PHI_3}, vision=TOWER)


@pytest.mark.parametrize(
    ("case", "bits", "dtype"),
    [
        (QWEN, 4, "float32"),
        (PHI, 4, "float32"),
        (GQA, 4, "float32"),
        (TIED, 8, "float32"),
        (NEXT, 4, "float32"),
        (NEXT, 8, "float32"),
        (GQA, 4, "float16"),
        (TIED, 8, "bfloat16"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_codes_are_transformers_on_what_they_stand_for(case, bits, dtype, tmp_path: Path) -> None:
    tiny.save(case, tmp_path / "whole")
    quantization = Quantization(bits=bits, group_size=32, vision=True)
    convert(tmp_path / "whole", tmp_path / "codes", quantization=quantization, dtype=dtype)
    convert(tmp_path / "codes", tmp_path / "plain", dequantize=True)
    reference = hf.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "plain", attn_implementation="eager", dtype=dtype
    ).eval()
    computed = Computed(case, *load(tmp_path / "codes"))
    if dtype != "float32":
        # MLX's CPU kernels add the products of codes in 16 bits, Metal's in float32.
        check_16_bits(computed, reference, times=4 if on_cpu() else 2)
        return
    theirs = computed.theirs(reference)
    for ours, expected in zip(computed.ours, theirs, strict=True):
        assert np.abs(ours - expected).max() < 3e-5
    assert (computed.ids == theirs[1].argmax(-1)).all()
