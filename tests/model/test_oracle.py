"""Our numbers are transformers' numbers, on tiny random checkpoints that it wrote itself."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle: pip install '.[test]'")
tiny = pytest.importorskip("tests.tiny")

from mlx_llava import stream_generate  # noqa: E402
from mlx_llava.generate import main  # noqa: E402
from mlx_llava.generation.prompt_cache import PromptCache  # noqa: E402
from mlx_llava.generation.steps import generate_step  # noqa: E402
from mlx_llava.model.batch_cache import make_batch_cache  # noqa: E402
from tests.conftest import MACHINES, as_on, shared_data  # noqa: E402
from tests.conftest import load_as_stored as load  # noqa: E402

TOLERANCE = 3e-5
#: Of each answer, as docs/is-it-right.md says; more than the smallest windows hold.
TOKENS = 32


def reference_logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits.float().numpy()


def max_error(ours: mx.array, theirs: np.ndarray, mask: np.ndarray | None = None) -> float:
    difference = np.abs(np.array(ours.astype(mx.float32)) - theirs)
    return float((difference if mask is None else difference[mask]).max())


@pytest.mark.parametrize("case", tiny.CASES, ids=lambda case: case.name)
def test_processor_states_logits_and_tokens(case, written) -> None:
    folder, reference = written(case)
    model, processor = load(folder)
    prompts, pictures = tiny.rows(case)
    batch = tiny.reference_inputs(case)
    inputs = processor(prompts, pictures, raw=True)

    mask = batch["attention_mask"].numpy()
    ids = np.array(inputs.input_ids)
    assert (ids[mask > 0] == batch["input_ids"].numpy()[mask > 0]).all()
    if inputs.attention_mask is not None:
        assert (np.array(inputs.attention_mask) == mask).all()
    states = []
    if inputs.pixel_values is not None:
        states = tiny.torch_hidden_states(reference, checked_pixels(case, inputs, batch))
    logits, tokens = reference_logits(reference, batch), reference_tokens(reference, case)
    alone = processor(prompts[0], pictures[0], raw=True)
    for machine in MACHINES:
        with as_on(machine):
            check_states(model, inputs, states)
            assert max_error(model(**inputs), logits, mask > 0) < TOLERANCE
            rows = [processor(*row, raw=True) for row in zip(prompts, pictures, strict=True)]
            check_rows(model, rows, [row[m > 0] for row, m in zip(logits, mask, strict=True)])
            embeddings = model.embed(**alone)
            steps = generate_step(embeddings, model.language_model, max_tokens=TOKENS)
            assert [token for token, _ in steps] == tokens


def check_rows(model, rows, expected: list[np.ndarray]) -> None:
    """The last logits of rows that are read together, each after its own beginning."""
    batch, rest = make_batch_cache(), []
    for i, row in enumerate(rows):
        x, begun = model.embed(**row), row.input_ids.shape[1] - 2 - i % 2
        cache = model.language_model.make_cache()
        model.language_model(input_embeddings=x[:, :begun], cache=cache)
        batch.join(cache)
        rest.append(x[0, begun:])
    for start, stop in ((None, -1), (-1, None)):
        new = [x[start:stop] for x in rest]
        layers = batch.step([len(x) for x in new])
        x = mx.concatenate(new)[:, None]
        ours = model.language_model(input_embeddings=x, cache=layers)[:, 0]
        theirs = [row[-len(x) :][start:stop] for row, x in zip(expected, rest, strict=True)]
        assert max_error(ours, np.concatenate(theirs)) < TOLERANCE


def checked_pixels(case, inputs, batch):
    """The tiles as transformers takes them, of which ours are no other."""
    theirs = batch["pixel_values"]
    if case.next or case.onevision:  # (images, tiles, 3, H, W), padded with tiles of zeros
        sizes = [tuple(size) for size in batch["image_sizes"].tolist()]
        if inputs.image_sizes is not None:
            pairs = zip(inputs.image_sizes, sizes, strict=True)
            assert all(ours in (theirs, None) for ours, theirs in pairs)
        theirs = torch.cat([tiles[tiles.flatten(1).any(1)] for tiles in theirs])
    assert (np.array(inputs.pixel_values).transpose(0, 3, 1, 2) == theirs.numpy()).all()
    return theirs


def check_states(model, inputs, expected: list[np.ndarray]) -> None:
    if not expected:
        return
    depth = model.config.vision_config.num_hidden_layers
    states = model.vision_tower(inputs.pixel_values, num_layers=depth)
    for ours, state in zip(states, expected, strict=True):
        assert max_error(ours, state) < TOLERANCE


def reference_tokens(reference, case, more: str = "") -> list[int]:
    """What transformers says to the first prompt, or to one that goes on."""
    prompts, pictures = tiny.rows(case)
    images = pictures[0] or None
    images = [images] if case.onevision else images
    batch = tiny.processor(case)(text=prompts[0] + more, images=images, return_tensors="pt")
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        theirs = reference.generate(**batch, max_new_tokens=TOKENS, do_sample=False)
    return theirs[0, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize(
    "name",
    ["qwen2_tied", "qwen2_windows", "phi3_window", "phi3_longrope", "next_qwen2", "next_phi3"],
)
def test_what_is_kept_of_a_prompt_answers_the_next_one(name, written):
    case = next(case for case in tiny.CASES if case.name == name)
    folder, reference = written(case)
    model, processor = load(folder)
    prompts, pictures = tiny.rows(case)
    cache = PromptCache(model)
    for more in ("", " A cat. USER: Why? ASSISTANT:", " A dog. USER: Where? ASSISTANT:"):
        stream = stream_generate(
            *(model, processor, prompts[0] + more, pictures[0]),
            raw=True,
            max_tokens=TOKENS,
            prompt_cache=cache,
        )
        *parts, last = stream
        ours = [part.token for part in (*parts, last)]
        assert ours == reference_tokens(reference, case, more)[: len(ours)]
        assert bool(more) == (last.cached_tokens > last.image_tokens)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["gqa", "mistral_window", "llama3_rope", "layer_list", "siglip", "next_one_image"]
)
def test_half_precision_is_close(name, dtype, tmp_path: Path) -> None:
    case = next(case for case in tiny.CASES if case.name == name)
    reference = tiny.save(case, tmp_path, getattr(torch, dtype))
    model, processor = load(tmp_path)
    assert model.vision_tower.dtype == getattr(mx, dtype)
    prompts, pictures = tiny.rows(case)
    batch = tiny.reference_inputs(case)
    mask = batch["attention_mask"].numpy() > 0
    batch["pixel_values"] = batch["pixel_values"].to(getattr(torch, dtype))
    theirs = reference_logits(reference, batch)
    logits = model(**processor(prompts, pictures, raw=True))
    assert logits.dtype == getattr(mx, dtype)
    difference = np.array(logits.astype(mx.float32))[mask] - theirs[mask]
    assert np.linalg.norm(difference) / np.linalg.norm(theirs[mask]) < 2e-2


@pytest.mark.parametrize("photograph", ["dog.jpeg", "extreme_ironing.jpg"])
@pytest.mark.parametrize("name", ["gqa", "next"])
def test_the_command_prints_the_words_of_transformers(name, photograph, written, capsys):
    from transformers.image_utils import load_image

    path = str(shared_data(f"images/{photograph}"))
    case = next(case for case in tiny.CASES if case.name == name)
    folder, reference = written(case)
    processor = tiny.processor(case)
    parts = [{"type": "image"}, {"type": "text", "text": "What is in this picture?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True
    )
    batch = processor(text=prompt, images=load_image(path), return_tensors="pt")
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        tokens = reference.generate(**batch, max_new_tokens=40, do_sample=False)
    theirs = processor.decode(tokens[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)

    arguments = ["--model", str(folder), "--image", path, "--max-tokens", "40"]
    assert main([*arguments, "--prompt", "What is in this picture?"]) == 0
    assert capsys.readouterr().out == theirs + "\n"
