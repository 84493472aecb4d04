"""Tiny random LLaVA checkpoints, written by transformers, and the reference run on them.

No config value is a class default and every weight carries noise of 0.2, so that a mistake
in any of them shows (with default initialisation, exact and approximate GELU look alike).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

CORPUS = (
    "USER: What is in this picture? ASSISTANT: A small dog that sleeps on a red chair.",
    "Describe the second image. How many cats are there, and which colour are they?",
    "The quick brown fox jumps over the lazy dog, while five wizards box with a jug of ink.",
    "There are two people on the left side of the photograph; one of them holds an umbrella.",
    "A woman in a blue dress walks along the beach under a cloudy sky near the old pier.",
    "Yes, the sign in the background says STOP. No, the kitchen table is not round: it is square.",
    "An orange cat and a black bird look at each other through the window of a yellow house.",
    "Answer the question using a single word or phrase: how many green apples do you see?",
)
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True, eq=False)  # so that what is made of a case can be kept
class Case:
    """What one tiny checkpoint is like; the defaults are no one's defaults."""

    name: str
    next: bool = False
    onevision: bool = False
    vip: bool = False
    family: str = "llama"
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)
    images: tuple[int, ...] = (1, 2, 0)
    do_pad: bool = False

    @property
    def kind(self) -> str:
        """How transformers' classes for it begin."""
        kinds = {"LlavaNext": self.next, "LlavaOnevision": self.onevision, "VipLlava": self.vip}
        return next((kind for kind, is_it in kinds.items() if is_it), "Llava")

    def config(self) -> hf.PreTrainedConfig:
        vision = {
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "image_size": 28,
            "patch_size": 7,
            "layer_norm_eps": 3e-3,
            "model_type": "clip_vision_model",
            **self.vision,
        }
        text = {
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 52,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 777,
            "rms_norm_eps": 1e-2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
            "model_type": self.family,
            **self.text,
        }
        top = {"image_token_index": tokenizer().token_to_id("<image>"), **self.top}
        side = vision["image_size"]
        if self.next:
            grid = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
            top = {"image_grid_pinpoints": [[h * side, w * side] for h, w in grid], **top}
        if self.onevision:
            sides = (side, 2 * side, 3 * side)
            grid = [[height, width] for height in sides for width in sides]
            top = {"image_grid_pinpoints": grid, "vision_aspect_ratio": "anyres_max_2", **top}
        return getattr(hf, f"{self.kind}Config")(
            vision_config=hf.AutoConfig.for_model(**vision),
            text_config=hf.AutoConfig.for_model(**text),
            **top,
        )


def tokenizer() -> Tokenizer:
    """A byte-level BPE with LLaVA's special tokens, trained on a few sentences."""
    return Tokenizer.from_str(_trained_tokenizer())


@cache
def _trained_tokenizer() -> str:
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>", "<image>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend.to_str()


def make_model(case: Case, dtype: torch.dtype = torch.float32) -> Any:
    """A reference model with noise of 0.2 on every weight."""
    torch.manual_seed(0)
    config = case.config()
    config._attn_implementation = "eager"
    model = getattr(hf, f"{case.kind}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.tie_weights()
    model.generation_config = hf.GenerationConfig(eos_token_id=None, pad_token_id=3)
    return in_dtype(model, dtype)


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """A model with its weights in a dtype; not RoPE's frequencies, as `from_pretrained` leaves."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def make_processor(case: Case) -> Any:
    """The reference processor of a case."""
    config = case.config()
    side = config.vision_config.image_size
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    is_siglip = config.vision_config.model_type == "siglip_vision_model"
    if case.next:
        pinpoints = config.image_grid_pinpoints
        images = LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints, **size)
    elif case.onevision:
        return onevision_processor(config, fast)
    elif is_siglip:
        colours = {"image_mean": [0.45, 0.5, 0.6], "image_std": [0.5, 0.4, 0.55]}
        images = SiglipImageProcessorPil(size={"height": side, "width": side}, **colours)
    else:
        images = LlavaImageProcessorPil(do_pad=case.do_pad, **size)
    processor_class = hf.LlavaNextProcessor if case.next else hf.LlavaProcessor
    return processor_class(
        image_processor=images,
        tokenizer=fast,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=getattr(config, "vision_feature_select_strategy", "default"),
        num_additional_image_tokens=int(not is_siglip),
        chat_template=TEMPLATE,
    )


#: The same one each time, to read with.
processor = cache(make_processor)


class LlavaOnevisionProcessor(hf.LlavaOnevisionProcessor):
    """transformers' own without the part for videos, which wants torchvision."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        vision_aspect_ratio: str = "anyres_max_9",
    ) -> None:
        self.num_image_tokens = num_image_tokens
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.vision_aspect_ratio = vision_aspect_ratio
        self.image_token = "<image>"
        self.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
        self.video_token, self.video_token_id = "<video>", None
        hf.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def onevision_processor(config: Any, words: Any) -> Any:
    """OneVision's reference processor, with other colours than its class has."""
    vision = config.vision_config
    has_class_token = vision.model_type == "clip_vision_model"
    images = LlavaOnevisionImageProcessorPil(
        size={"height": vision.image_size, "width": vision.image_size},
        image_grid_pinpoints=config.image_grid_pinpoints,
        image_mean=[0.45, 0.5, 0.6],
        image_std=[0.5, 0.4, 0.55],
    )
    return LlavaOnevisionProcessor(
        images,
        words,
        num_image_tokens=(vision.image_size // vision.patch_size) ** 2 + has_class_token,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        vision_aspect_ratio=config.vision_aspect_ratio,
        chat_template=TEMPLATE,
    )


def read_onevision_processor(folder: Path) -> LlavaOnevisionProcessor:
    """OneVision's of a folder's files, without the part for videos."""
    settings = json.loads((folder / "processor_config.json").read_text())
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessorPil.from_pretrained(folder),
        hf.AutoTokenizer.from_pretrained(folder),
        num_image_tokens=settings["num_image_tokens"],
        vision_feature_select_strategy=settings["vision_feature_select_strategy"],
        vision_aspect_ratio=settings.get("vision_aspect_ratio", "anyres_max_9"),
    )


def save(case: Case, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Writes a checkpoint as transformers does; returns the reference model."""
    model = make_model(case, dtype)
    model.save_pretrained(folder)
    processor(case).save_pretrained(folder)
    return model


@lru_cache(maxsize=8)  # the large ones take longer than what is tested with them
def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth random colours with noise on top: every resize filter shows."""
    rng = np.random.default_rng(seed + 1000 * width + height)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noise = rng.integers(-30, 30, (height, width, 3))
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


SIZES = ((50, 41), (20, 64), (90, 30), (31, 77), (28, 28), (17, 13))


def rows(case: Case) -> tuple[list[str], list[list[Image.Image]]]:
    """Raw prompts of unequal length with the pictures of each."""
    prompts, pictures = [], []
    sizes = iter(SIZES)
    for row, count in enumerate(case.images):
        marks = "".join(f"{i}<image>\n" for i in range(count))
        prompts.append(f"USER: {marks}{CORPUS[row % 3][: 9 + 8 * row]} ASSISTANT:")
        pictures.append([picture(*next(sizes), seed=i) for i in range(count)])
    return prompts, pictures


def reference_inputs(case: Case) -> hf.BatchFeature:
    """What transformers' processor makes of `rows`."""
    return hf.BatchFeature(_reference_inputs(case).data)  # to add to


@cache
def _reference_inputs(case: Case) -> hf.BatchFeature:
    prompts, pictures = rows(case)
    flat = [image for row in pictures for image in row]
    images = pictures if case.onevision else flat  # which reads several of one prompt otherwise
    batch = processor(case)(
        text=prompts, images=images if flat else None, padding=True, return_tensors="pt"
    )
    batch.pop("token_type_ids", None)
    return batch


def torch_hidden_states(model: Any, pixel_values: torch.Tensor) -> list[np.ndarray]:
    """Every hidden state of the reference vision tower, [0] the embedding."""
    with torch.no_grad():
        tower = model.model.vision_tower
        states = tower(pixel_values, output_hidden_states=True).hidden_states
    return [state.float().numpy() for state in states]


SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_act": "gelu_pytorch_tanh",
    "image_size": 31,
    "vision_use_head": False,
}
INTERLEAVE = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 700.0,
    "factor": 6.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.5,
    "original_max_position_embeddings": 48,
}
#: Whose own id lies outside a small vocabulary.
PHI_3 = {"pad_token_id": 3}
#: Other factors for long prompts than for short ones, and scaled attention.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 900.0,
    "short_factor": [1.0, 1.3, 2.0, 3.5],
    "long_factor": [1.5, 4.0, 9.0, 20.0],
    "original_max_position_embeddings": 150,
}
LINEAR = {"rope_type": "linear", "rope_theta": 300.0, "factor": 2.5}

#: Of layers of two kinds.
WINDOWS = {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1}

CASES = (
    Case("vicuna", text={"num_key_value_heads": 4}),
    Case("gqa"),
    Case("mqa_one_row", text={"num_key_value_heads": 1}, images=(1,)),
    Case("three_images_one_row", images=(3,)),
    Case("text_only", images=(0, 0)),
    Case("text_only_between", images=(1, 0, 3, 1)),
    Case("tied_head", text={"tie_word_embeddings": True}),
    Case("tied_at_top", top={"tie_word_embeddings": True}),
    Case("theta", text={"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}),
    Case("linear_rope", text={"rope_parameters": LINEAR}),
    Case("llama3_rope", text={"rope_parameters": LLAMA3}),
    Case("eps", text={"rms_norm_eps": 0.3}, vision={"layer_norm_eps": 0.2}),
    Case("head_dim", text={"head_dim": 20}),
    Case("attention_bias", text={"attention_bias": True, "mlp_bias": True}),
    Case("mistral_window", family="mistral", text={"sliding_window": 13}),
    Case("mistral_no_window", family="mistral", text={"sliding_window": None, "head_dim": 12}),
    Case("qwen2", family="qwen2"),
    Case("qwen2_tied", family="qwen2", text={"tie_word_embeddings": True, "head_dim": 12}),
    Case("phi3", family="phi3", text={**PHI_3, "num_key_value_heads": None}),
    Case("phi3_window", family="phi3", text={**PHI_3, "sliding_window": 11}, images=(1, 2)),
    Case(
        "phi3_longrope",
        family="phi3",
        text={**PHI_3, "original_max_position_embeddings": 150, "rope_parameters": LONGROPE},
    ),
    Case("qwen2_windows", family="qwen2", text=WINDOWS),
    Case(
        "qwen2_window_between",
        family="qwen2",
        text={**WINDOWS, "layer_types": ["sliding_attention", "full_attention"] * 2}
        | {"num_hidden_layers": 4},
        images=(2, 1),
    ),
    Case("layer_last", top={"vision_feature_layer": -1}),
    Case("layer_first", top={"vision_feature_layer": 1}),
    Case("layer_positive", top={"vision_feature_layer": 3}),
    Case("layer_list", top={"vision_feature_layer": [-3, 1, -1]}),
    Case("keep_class_token", top={"vision_feature_select_strategy": "full"}),
    Case(
        "layers_and_class_token",
        top={"vision_feature_layer": [2, -2], "vision_feature_select_strategy": "full"},
    ),
    Case("projector_tanh_gelu", top={"projector_hidden_act": "gelu_pytorch_tanh"}),
    Case(
        "projector_no_bias",
        top={"multimodal_projector_bias": False, "projector_hidden_act": "relu"},
    ),
    Case("exact_gelu_tower", vision={"hidden_act": "gelu"}),
    Case("uneven_patches", vision={"image_size": 31, "patch_size": 9}),
    Case("pad", do_pad=True),
    Case("siglip", vision=SIGLIP, top=INTERLEAVE),
    Case("siglip_qwen2", family="qwen2", vision=SIGLIP, top=INTERLEAVE, images=(4, 2, 0)),
    Case("siglip_head", vision={**SIGLIP, "vision_use_head": True}, top=INTERLEAVE, images=(1,)),
    Case(
        "siglip_layers",
        vision={**SIGLIP, "hidden_act": "gelu", "patch_size": 5},
        top={**INTERLEAVE, "vision_feature_layer": [2, -2]},
    ),
    Case("siglip_default_strategy", vision=SIGLIP, images=(3,)),
    Case("vip", vip=True, vision={"num_hidden_layers": 11}, top={"projector_layernorm_eps": 0.1}),
    Case(
        "vip_layers",
        vip=True,
        family="qwen2",
        top={"vision_feature_layer": [3, -2], "projector_layernorm_eps": 0.02},
        images=(3, 1),
    ),
    Case("next", next=True),
    Case("next_one_image", next=True, images=(1,)),
    Case("next_three_images", next=True, images=(3, 1)),
    Case("next_mistral", next=True, family="mistral", text={"sliding_window": 40}),
    Case("next_qwen2", next=True, family="qwen2", text={"num_key_value_heads": 4}),
    Case("next_phi3", next=True, family="phi3", text={**PHI_3, "sliding_window": 37}),
    Case("next_layers", next=True, top={"vision_feature_layer": [1, -2]}),
    Case("next_siglip", next=True, vision=SIGLIP, top=INTERLEAVE, images=(1, 2)),
    Case("next_llama3", next=True, text={"rope_parameters": LLAMA3, "num_key_value_heads": 1}),
    Case("onevision", onevision=True, family="qwen2", vision=SIGLIP, top=INTERLEAVE),
    Case(
        "onevision_cut",
        onevision=True,
        family="qwen2",
        vision=SIGLIP,
        top=INTERLEAVE,
        images=(1, 1, 0, 1),
    ),
    Case(
        "onevision_tied_padded",
        onevision=True,
        family="qwen2",
        text={"tie_word_embeddings": True},
        vision={**SIGLIP, "patch_size": 5},
        top={**INTERLEAVE, "vision_aspect_ratio": "anyres_max_1"},
        images=(2, 1, 3),
    ),
    Case(
        "onevision_clip",
        onevision=True,
        top={"vision_feature_layer": -2, "vision_feature_select_strategy": "default"},
        images=(1, 2),
    ),
    Case("next_uneven", next=True, vision={"image_size": 25, "patch_size": 6}),
)
