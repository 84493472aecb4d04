"""Is a checkpoint read right? From its files to a forward pass, point by point."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from PIL import Image

from mlx_llava.checkpoint.hub import Source
from mlx_llava.checkpoint.load import empty_model, load_opened
from mlx_llava.checkpoint.open import Checkpoint, open_checkpoint
from mlx_llava.checkpoint.precision import suit_device
from mlx_llava.inputs.inputs import Inputs
from mlx_llava.inputs.processor import Processor
from mlx_llava.json_files import sensible_values
from mlx_llava.model.device import configure_device
from mlx_llava.model.linux.adopt import adopt
from mlx_llava.model.llava import Llava
from mlx_llava.model.quantized import layer_settings
from mlx_llava.signatures import takes

QUESTION = "What is in this picture?"


def example_image() -> Image.Image:
    """A drawn picture of 300 x 200, whose canvas the two conventions of anyres choose apart."""
    return Image.linear_gradient("L").resize((300, 200)).convert("RGB")


@takes(Source, "model")
def verify(path_or_repo: str | Path | None = None, **source: Any) -> Iterator[tuple[str, str]]:
    """Reads a checkpoint as `load` does, and says what it was read as.

    Args:
        path_or_repo (str or Path, optional): See `load`.
        **source: Fields of `Source`.

    Yields:
        tuple: A check that holds, and what was found: layout, warnings, tensors, dtypes,
            quantisation, template, ends, pictures, features, prompt, ids and forward pass.

    Raises:
        ValueError: One does not; its name comes first.
    """
    with _check("layout"), sensible_values(path_or_repo or "the embedded model"):
        checkpoint = open_checkpoint(Source(path_or_repo, **source))
    yield "layout", checkpoint.contents.layout
    yield "warnings", " ".join(checkpoint.contents.warnings) or "none"
    with _check("tensors"):
        empty_model(checkpoint)
    yield from _describe_tensors(checkpoint)
    with _check("weights"):
        model, processor = load_opened(checkpoint)
        configure_device()
        suit_device(model)
        adopt(model)
        mx.eval(model.state)
    yield from _describe_processor(checkpoint, processor)
    with _check("prompt"):
        inputs = processor(QUESTION, example_image())
    yield "prompt", repr(inputs.prompts[0])
    ids = inputs.input_ids[0].tolist()
    with _check("ids"):
        _check_ids(processor, ids)
    yield "ids", _folded(ids, model.config.image_token_index)
    with _check("forward pass"):
        logits = _forward(model, inputs)
    extent = f"{float(logits.min()):.4g} to {float(logits.max()):.4g}"
    yield "forward pass", f"finite, logits of the first word from {extent}"


@contextmanager
def _check(name: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{name}: {error}") from error


def _describe_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    tensors, dropped = checkpoint.contents.tensors, checkpoint.contents.dropped
    parts = _counted(name.partition(".")[0] for name in tensors)
    yield "tensors", f"none missing, left over or of another shape: {parts}"
    yield "dropped", _counted(dropped.values()) or "none"
    dtypes = (str(tensor.dtype) for tensor in tensors.values())
    yield "dtypes", _counted(dtype.removeprefix("mlx.core.") for dtype in dtypes)
    layers = sum(name.endswith(".scales") for name in tensors)
    settings = layer_settings(checkpoint.config.quantization or {})
    common = ", ".join(f"{key} {value}" for key, value in settings.items())
    yield "quantisation", f"{layers} layers, {common}" if layers else "none"


def _counted(names: Iterable[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(Counter(names).items()))


def _describe_processor(checkpoint: Checkpoint, processor: Processor) -> Iterator[tuple[str, str]]:
    config, template, images = processor.config, processor.template, processor.image_processor
    doubt = checkpoint.template_doubt
    yield "template", template.name + (f"; a guess: {doubt}" if doubt else "")
    marks = {i: processor.tokenizer.text_of(i) for i in sorted(processor.eos_ids)}
    texts = [f"text {stop!r}" for stop in template.stops if stop not in marks.values()]
    yield "ends", ", ".join([*(f"{i} {mark}" for i, mark in marks.items()), *texts])
    image = example_image()
    size, tokens = f"{image.width} x {image.height}", images.num_tokens(image.size[::-1])
    side = config.vision_config.image_size
    yield "pictures", f"{images.mode}, tiles of {side}; {size} takes {tokens} tokens"
    states = " and ".join(map(str, config.feature_layers))
    first = "class token" if config.vision_config.has_class_token else "first patch"
    yield (
        "features",
        f"hidden state {states} of 0 to {config.vision_config.num_hidden_layers} "
        f"(vision_feature_layer {config.vision_feature_layer}), {first} "
        f"{'dropped' if config.drops_first else 'kept'}",
    )


def _check_ids(processor: Processor, ids: list[int]) -> None:
    rows = processor.config.text_config.vocab_size
    text = [i for i in ids if i != processor.config.image_token_index]
    if max(text) >= rows:
        raise ValueError(f"the tokenizer gives {max(text)}, but the embedding has {rows} rows.")
    if QUESTION not in (read := processor.tokenizer.decode(text)):
        raise ValueError(f"they say {read!r}, where the question is {QUESTION!r}.")


def _folded(ids: list[int], image: int) -> str:
    runs = ((token, len(list(run))) for token, run in groupby(ids))
    shown = (
        f"<{image} x {n}>" if token == image else " ".join([str(token)] * n) for token, n in runs
    )
    return f"{len(ids)}: {' '.join(shown)}"


def _forward(model: Llava, inputs: Inputs) -> mx.array:
    """The logits of the word after a prompt, all of whose hidden states are finite as well."""
    embeddings = model.embed(**inputs)
    *_, hidden = model.language_model.hidden_states(embeddings)
    logits = model.language_model.logits(hidden[:, -1]).astype(mx.float32)
    for what, values in (("hidden states", hidden), ("logits", logits)):
        if bad := int((~mx.isfinite(values)).sum()):
            raise ValueError(f"{bad} of {values.size} {what} are NaN or infinite.")
    return logits


def compare(
    source: tuple[nn.Module, Processor], result: tuple[nn.Module, Processor]
) -> dict[str, float]:
    """Runs two models on one drawn picture and question.

    Returns:
        dict: ``max_difference`` of the logits, ``top_1`` the fraction of positions with the same
        likeliest token, ``kl`` the mean divergence of the result from the source in nats.
    """
    image = example_image()
    (model, processor), (other, other_processor) = source, result
    logits = model(**processor(QUESTION, image)).astype(mx.float32)
    others = other(**other_processor(QUESTION, image)).astype(mx.float32)
    rows = min(logits.shape[-1], others.shape[-1])
    logits, others = logits[..., :rows], others[..., :rows]
    log_p, log_q = nn.log_softmax(logits), nn.log_softmax(others)
    return {
        "max_difference": float(mx.abs(logits - others).max()),
        "top_1": float((logits.argmax(-1) == others.argmax(-1)).mean()),
        "kl": float((mx.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
    }
