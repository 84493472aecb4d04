"""Every published LLaVA of `tests.published`, made small, read, and compared with its reference.

A row's config.json keeps all its keys; sizes alone are scaled, not the vocabulary and not the
pictures. Its random weights go into files under the published names.
"""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import numpy as np
import torch
import transformers as hf

from mlx_llava import load
from mlx_llava.checkpoint.original import translate
from mlx_llava.checkpoint.verify import QUESTION, example_image, verify
from mlx_llava.files import one_line
from mlx_llava.inputs.chat_template import JinjaTemplate
from mlx_llava.inputs.inputs import Inputs
from mlx_llava.inputs.processor import Processor
from mlx_llava.inputs.templates import Guess, guess_template
from mlx_llava.inputs.video import Video
from mlx_llava.model.config import LlavaConfig
from mlx_llava.model.llava import Llava
from tests import layouts, tiny
from tests.certificate_files import WRITERS, Written, is_linear
from tests.certificate_tokenizers import ids_of_original, ids_of_transformers
from tests.published import ROWS
from tests.published.family import SO400M
from tests.published.row import CLIP_336, FILES, KNOWLEDGE, Published, Settings

#: float32 against float64, of the largest logit.
TOLERANCE = 3e-5
LAST = 8  # at so many places logits are compared; all of them see the picture

HEADS = {14: 2, 16: 2, 28: 4, 32: 2, 40: 3, 56: 4, 64: 4}
TOWER: Settings = {
    "hidden_size": 64,  # one head: CLIP's have 64 each, which originals do not say
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 1,
    "patch_size": 56,  # instead of 14: a sixteenth of the tokens
}
TOWERS = {
    "openai/clip-vit-large-patch14": {**CLIP_336, **TOWER, "image_size": 224},
    # Patches of 63 pixels leave 6 of 384, as those of 14 do, from which the size is told.
    "google/siglip-so400m-patch14-384": {**SO400M, **TOWER, "patch_size": 63},
}


def scaled(row: Published) -> Settings:
    """A row's config.json with its sizes scaled down."""
    config = copy.deepcopy(row.config)
    wide = bool(row.quantization) or row.layout == "gguf"  # whole groups and blocks
    text = config.get("text_config", config)
    published = text.get("num_attention_heads", 32)
    heads = 4 if wide else HEADS[published]
    width = 32 if wide else 16
    sizes = {
        "hidden_size": heads * width,
        "intermediate_size": 256 if wide else 96,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
    }
    kv_heads = text.get("num_key_value_heads", 32 if text.get("model_type") == "qwen2" else None)
    if kv_heads is not None:
        sizes["num_key_value_heads"] = max(1, heads * kv_heads // published)
    if "head_dim" in text:
        sizes["head_dim"] = width
    text |= sizes
    if "text_config" in config:
        layers = 11 if config["model_type"] == "vipllava" else TOWER["num_hidden_layers"]
        config["vision_config"] |= {**TOWER, "num_hidden_layers": layers}
    else:
        config["mm_hidden_size"] = TOWER["hidden_size"]
    if row.vocabulary == "small":
        config["vocab_size"] = layouts.VOCABULARY
    return config


#: What transformers reads of an original config.json.
LLAMA_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta"),
    *("rope_scaling", "sliding_window", "hidden_act", "attention_bias"),
)


def as_hf(config: Settings) -> Settings:
    """What an original config.json means, in llava-hf's words."""
    ratio = config.get("image_aspect_ratio")
    is_next, is_onevision = ratio == "anyres", ratio == "anyres_max_9"
    text = {key: config[key] for key in LLAMA_KEYS if key in config}
    kinds = {"Mistral": "mistral", "Qwen": "qwen2"}
    named = config["architectures"][0]
    text |= {
        "model_type": next((kind for name, kind in kinds.items() if name in named), "llama"),
        "vocab_size": -(-(config["vocab_size"] + 2) // 64) * 64,
    }
    tower = {**CLIP_336, **TOWER}
    seen = {
        "vision_feature_layer": config["mm_vision_select_layer"],
        "vision_feature_select_strategy": "default",
    }
    if "siglip" in config["mm_vision_tower"]:  # whose class reads neither (siglip_encoder.py)
        seen = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    kind = "llava_onevision" if is_onevision else "llava_next" if is_next else "llava"
    return {
        "model_type": kind,
        "image_token_index": config["vocab_size"],
        "text_config": text,
        "vision_config": TOWERS.get(config["mm_vision_tower"], tower),
        **seen,
        "tie_word_embeddings": config["tie_word_embeddings"] if is_onevision else False,
        **({"image_grid_pinpoints": config["image_grid_pinpoints"]} if kind != "llava" else {}),
    }


class OneLayer(torch.nn.Module):
    """The projector of LLaVA before 1.5, which transformers has not."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear_1 = torch.nn.Linear(inputs, outputs)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_1(features)


def reference(config: Settings) -> Any:
    """transformers' model of a scaled config.json, with weights that bfloat16 holds."""
    is_hf = "text_config" in config
    data = config if is_hf else as_hf(config)
    passed = ("text_config", "vision_config", "tie_word_embeddings", "image_grid_pinpoints")
    passed += ("projector_hidden_act", "vision_feature_layer", "vision_feature_select_strategy")
    if data["model_type"] == "vipllava":  # transformers 5 would read what version 4 did not
        passed = passed[: passed.index("vision_feature_layer")]
    spelled = json.dumps({key: data[key] for key in passed if key in data}, sort_keys=True)
    return _reference(data["model_type"], spelled, not is_hf and is_linear(config))


@cache
def _reference(model_type: str, spelled: str, linear: bool) -> Any:
    config = hf.AutoConfig.for_model(model_type, **json.loads(spelled))
    torch.manual_seed(0)
    model = hf.AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    if linear:
        sizes = config.vision_config.hidden_size, config.text_config.hidden_size
        model.model.multi_modal_projector = OneLayer(*sizes)
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data.normal_(centre, 0.2)
        parameter.data.copy_(parameter.data.bfloat16().float())
    return model


def with_weights(model: Any, meant: dict[str, torch.Tensor], image_token: int) -> Any:
    """A copy in float64, with other weights by canonical name."""
    model = copy.deepcopy(model).double()
    state = model.state_dict()
    names = dict(zip(layouts.state_dict(model), state, strict=True))
    for name, tensor in meant.items():
        state[names[name]][: len(tensor)] = tensor.double()
    model.config.image_token_id = image_token
    return model


def logits_of(model: Any, inputs: Inputs) -> np.ndarray:
    """The reference's last logits on the inputs of the processor under test."""
    pixels = torch.tensor(np.array(inputs.pixel_values).transpose(0, 3, 1, 2)).double()
    arguments: dict[str, Any] = {"pixel_values": pixels}
    if inputs.videos:
        arguments = {"pixel_values_videos": pixels[None]}
    elif inputs.image_sizes is not None:
        sizes = torch.tensor(inputs.image_sizes)
        arguments = {"pixel_values": pixels[None], "image_sizes": sizes}
    ids = torch.tensor(np.array(inputs.input_ids))
    with torch.no_grad():
        return model(input_ids=ids, logits_to_keep=LAST, **arguments).logits[0].numpy()


def our_logits(model: Llava, inputs: Inputs) -> np.ndarray:
    """The same of the model under test."""
    embeddings = model.embed(inputs.input_ids, inputs.pixel_values, inputs.image_sizes)
    *_, hidden = model.language_model.hidden_states(embeddings)
    return np.array(model.language_model.logits(hidden[0, -LAST:]).astype(mx.float32))


@dataclass(frozen=True)
class Certificate:
    """What was found of a row.

    Attributes:
        row: the row.
        found: the checks of `verify`, by name.
        template: the name of the chosen template.
        doubt: why another may be right, by the published sizes.
        ends: ids that end an answer.
        mode: how pictures are cut.
        tokens: how many the example picture takes.
        layer: which hidden state of the tower is read.
    """

    row: Published
    found: dict[str, str]
    template: str
    doubt: str
    ends: tuple[int, ...]
    mode: str
    tokens: int
    layer: int | tuple[int, ...]


def check_ids(row: Published, written: Written, processor: Processor) -> None:
    """The ids of a question about the example picture are the reference's."""
    picture = example_image()
    inputs = processor(QUESTION, picture)
    ours = inputs.input_ids[0].tolist()
    if "text_config" in row.config:
        theirs = ids_of_transformers(written.path, row, picture)
        assert ours == theirs["input_ids"][0].tolist()
        pixels = theirs["pixel_values"].reshape(-1, *theirs["pixel_values"].shape[-3:])
        assert np.array_equal(np.array(inputs.pixel_values), pixels.numpy().transpose(0, 2, 3, 1))
    else:
        image = processor.config.image_token_index
        assert ours == ids_of_original(row, *inputs.image_tokens, image)


def published_tokens(processor: Processor) -> int:
    """How many tokens the example picture takes with the published patches of 14 pixels."""
    config = processor.config
    vision = replace(config.vision_config, patch_size=CLIP_336["patch_size"])
    images = replace(processor.image_processor, config=replace(config, vision_config=vision))
    return images.num_tokens(example_image().size[::-1])


def published_guess(row: Published) -> Guess:
    """The built-in template that the published sizes point to."""
    data = {key: value for key, value in row.config.items() if key != "quantization_config"}
    if "text_config" in data:
        return guess_template(LlavaConfig.from_dict(data))
    name = f"{row.name.rpartition('/')[2]} {data.get('_name_or_path')}"
    config = LlavaConfig.from_dict(translate(data, CLIP_336, data["vocab_size"]))
    return guess_template(config, "" if row.layout == "gguf" else name)


def check_logits(
    row: Published, written: Written, config: Settings, model: Llava, processor: Processor
) -> None:
    """The logits of a question about a picture, and of one about a video, are the reference's."""
    expected = with_weights(reference(config), written.meant, model.config.image_token_index)
    asked = [processor(QUESTION, tiny.picture(500, 333))]
    if "video_token_index" in config:
        film = Video(tuple(tiny.picture(120, 90, seed) for seed in range(3)))
        asked.append(processor(QUESTION, video=film))
    for inputs in asked:
        theirs = logits_of(expected, inputs)[:, : config.get("vocab_size")]
        ours = our_logits(model, inputs)[:, : theirs.shape[1]]
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert error < TOLERANCE, f"logits differ by {error:.1e} of the largest"


@cache
def certify(row: Published) -> Certificate:
    """Writes a row's checkpoint, reads it, and compares it with its reference.

    Raises:
        AssertionError: It differs.
        UserWarning: Reading it warns.
    """
    config = scaled(row)
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        written = WRITERS[row.layout](row, config, reference(config), Path(folder))
        found = dict(verify(written.path, **written.source))
        model, processor = load(written.path, dtype="float32", **written.source)
        check_ids(row, written, processor)
        check_logits(row, written, config, model, processor)
    is_own = isinstance(processor.template, JinjaTemplate)
    guess = Guess("own") if is_own else published_guess(row)
    assert is_own or processor.template.name == guess.name
    return Certificate(
        row=row,
        found=found,
        template=guess.name,
        doubt=guess.doubt,
        ends=tuple(sorted(processor.eos_ids)),
        mode=processor.image_processor.mode,
        tokens=published_tokens(processor),
        layer=model.config.vision_feature_layer,
    )


INTRODUCTION = """# Certificate

Is a checkpoint read right? `python -m mlx_llava.convert --model NAME --verify` answers for the one
at hand; this page answers for {count} by name. `scripts/make_certificate.py` writes it from what
`tests/certificate.py` finds, and a test fails where it is out of date.

No published weights were used. Of each checkpoint a small one is made: its config.json with every
key, where only sizes are scaled; its tensors' names, its container and its other parts (CLIP,
LLaMA, Vicuna, a second file) as they are published; random weights. A row **holds** if

- it loads without a warning, and no tensor is missing, left over or of another shape;
- the ids of a question about a picture are those of transformers' processor on the same files, or
  of sentencepiece by the original's rule;
- template, ends of answer, image mode, feature layer and the tokens of a picture, with the
  published patches of 14 pixels, are those that the test's table says;
- logits, of llava-hf's video models also those about a video, are within 3e-5 of the largest of
  what transformers gives in float64 for the same weights, or for those that quantised ones mean.

The settings of {files} are those of published files, of {quoted} those that public repositories
quote; the others are written from knowledge, and keys that nothing reads may differ there. The
tokenizers of {real} are the real ones where the tests have them; others are small, with the
published ids of special tokens. *A guess* is a template that no file names. The towers of GGUF
pairs were stored without CLIP's last layer: their layer -1 is the others' -2.

| checkpoint | settings | layout, container | template | ends | a picture of 300 x 200 | layer | |
|---|---|---|---|---|---|---|---|
"""
CONTAINERS = {"safetensors": "safetensors", "zip": "PyTorch"}


def introduction() -> str:
    """What stands above the table of docs/certificate.md."""
    known = [row.source.partition(",")[0] for row in ROWS]
    files, knowledge = known.count(FILES), known.count(KNOWLEDGE)
    real = sum(row.vocabulary == "LLaMA" for row in ROWS)
    quoted = len(ROWS) - files - knowledge
    return INTRODUCTION.format(count=len(ROWS), files=files, quoted=quoted, real=real)


def line(row: Published) -> str:
    """A row of the table."""
    container = CONTAINERS.get(row.container, row.container)
    try:
        found = certify(row)
    except (AssertionError, UserWarning, ValueError, OSError) as error:
        cells = [container, *[""] * 4, f"**fails**: {one_line(error)}"]
    else:
        doubt = f" (a guess: {found.doubt})" if found.doubt else ""
        cells = [
            f"{found.found['layout']}, {container}",
            found.template + doubt,
            found.found["ends"],
            f"{found.mode}, {found.tokens} tokens",
            str(found.layer).strip("()"),
            "holds",
        ]
    shown = (cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells)
    return f"| {' | '.join((row.name, row.source, *shown))} |\n"


def page() -> str:
    """The content of docs/certificate.md."""
    return introduction() + "".join(map(line, ROWS))
