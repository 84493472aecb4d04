"""The same tiny LLaVA in every layout: what other programs write, written by test code.

The model is transformers'; its vocabulary is a small SentencePiece model plus the placeholder.
"""

from __future__ import annotations

import copy
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from safetensors.torch import save_file

from tests import tiny

VOCABULARY = 360
PADDED = 384  # with the placeholder and more, up to a multiple of 64

TEXT = {
    "vocab_size": PADDED,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": None,
}
VISION = {
    "hidden_size": 128,  # two heads of 64, as every CLIP of OpenAI's has
    "intermediate_size": 192,
    "num_attention_heads": 2,
    "layer_norm_eps": 1e-5,
}


@cache
def sentencepiece_model() -> bytes:
    """A BPE model with LLaMA's settings, trained on a few sentences."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.CORPUS * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


def case(next: bool = False, **text: Any) -> tiny.Case:
    """The tiny model that all layouts hold."""
    return tiny.Case(
        "layouts",
        next=next,
        text={**TEXT, **text},
        vision=VISION,
        top={"image_token_index": VOCABULARY},
    )


def state_dict(model: Any) -> dict[str, torch.Tensor]:
    """The tensors of a reference model under llava-hf's own names."""
    renamed = {}
    for key, tensor in model.state_dict().items():
        key = key.removeprefix("model.")
        key = key.replace("language_model.", "language_model.model.", 1)
        key = key.replace("lm_head.", "language_model.lm_head.", 1)
        if key.startswith("vision_tower.") and ".vision_model." not in key:
            key = key.replace("vision_tower.", "vision_tower.vision_model.", 1)
        renamed[key] = tensor.detach().clone()
    return renamed


def to_original(tensors: dict[str, torch.Tensor], rows: int = VOCABULARY) -> dict[str, Any]:
    """haotian-liu's names, and a vocabulary without the placeholder."""
    renamed = {}
    for key, tensor in tensors.items():
        if "embed_tokens" in key or "lm_head" in key:
            tensor = tensor[:rows].clone()
        for old, new in (
            ("language_model.model.", "model."),
            ("language_model.lm_head.", "lm_head."),
            ("vision_tower.", "model.vision_tower.vision_tower."),
            ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
            ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
            ("image_newline", "model.image_newline"),
        ):
            if key.startswith(old):
                key = new + key.removeprefix(old)
                break
        renamed[key] = tensor
    return renamed


def original_config(model: Any, **extra: Any) -> dict[str, Any]:
    """The original's config.json for a reference model."""
    text = model.config.text_config
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "vocab_size": VOCABULARY,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "max_position_embeddings": text.max_position_embeddings,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_parameters["rope_theta"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "mm_hidden_size": model.config.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_aspect_ratio": "pad",
        "tokenizer_model_max_length": 2048,
        "unfreeze_mm_vision_tower": True,
        **extra,
    }


def write_folder(
    folder: Path, tensors: dict[str, torch.Tensor], config: dict, kind: str = "zip", shards: int = 1
) -> Path:
    """A folder of an original checkpoint in one of the ways to store tensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True}))
    names = list(tensors)
    for i in range(shards):
        part = {key: tensors[key].contiguous() for key in names[i::shards]}
        number = f"-{i + 1:05}-of-{shards:05}" if shards > 1 else ""
        if kind == "safetensors":
            save_file(part, folder / f"model{number}.safetensors", {"format": "pt"})
        else:
            path = folder / f"pytorch_model{number}.bin"
            torch.save(part, path)
    return folder


def write_clip(folder: Path, tensors: dict[str, torch.Tensor], model: Any) -> Path:
    """The repository for the tower of a reference model: both halves of CLIP, or of SigLIP."""
    folder.mkdir(parents=True)
    tower = {
        key.removeprefix("vision_tower."): tensor
        for key, tensor in tensors.items()
        if key.startswith("vision_tower.")
    }
    tower["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    tower["text_model.final_layer_norm.weight"] = torch.ones(8)
    tower["logit_scale"] = tower["logit_bias"] = torch.tensor(4.6)
    tower["visual_projection.weight"] = torch.ones(8, 128)
    torch.save(tower, folder / "pytorch_model.bin")
    vision = model.config.vision_config.to_dict()
    kind = vision["model_type"].removesuffix("_vision_model")
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "vision_config": vision}))
    return folder


def inputs_of(processor: Any, count: int = 1) -> Any:
    """A raw prompt with pictures, prepared by the processor under test."""
    images = [tiny.picture(*size) for size in tiny.SIZES[:count]]
    return processor("USER: " + "<image>\n" * count + "How many dogs? ASSISTANT:", images, raw=True)


def reference_logits(model: Any, inputs: Any) -> np.ndarray:
    """The reference's logits, in float64, on the inputs of the processor under test."""
    model = copy.deepcopy(model).double()
    pixels = torch.tensor(np.array(inputs.pixel_values).transpose(0, 3, 1, 2)).double()
    arguments: dict[str, Any] = {"pixel_values": pixels}
    if inputs.image_sizes is not None:
        arguments = {
            "pixel_values": pixels[None],
            "image_sizes": torch.tensor(inputs.image_sizes),
        }
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(np.array(inputs.input_ids)), **arguments).logits
    return logits.numpy()[..., :VOCABULARY]


def tuned_llama(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The language model alone, as a LLaMA checkpoint names it."""
    prefixes = ("model.mm_projector", "model.vision_tower", "model.image_newline")
    return {key: t for key, t in to_original(tensors).items() if not key.startswith(prefixes)}
