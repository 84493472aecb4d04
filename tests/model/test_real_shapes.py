"""Layers of CLIP ViT-L/14-336 and one of Vicuna-7B, on a real photograph and the real tokenizer:
ids and logits are transformers'. Random weights; all of that takes about 5 GB of memory."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_llava import load
from mlx_llava.model import blas as backend
from tests.conftest import shared_data

torch = pytest.importorskip("torch", reason="the oracle: pip install '.[test]'")
hf = pytest.importorskip("transformers")
tiny = pytest.importorskip("tests.tiny")
no_init_weights = pytest.importorskip("transformers.initialization").no_init_weights

IMAGE = 32000


def write_checkpoint(folder: Path, tokenizer_model: bytes, layers: int, width: int):
    """LLaVA-1.5-7B's shape with so many of its tower's 24 layers, and 1 of its decoder's 32.

    Of its decoder's 4096 states, so many, with as many heads (of 128) and hidden units to each.
    """
    torch.manual_seed(0)
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(
            num_hidden_layers=1,
            vocab_size=32064,
            rms_norm_eps=1e-5,
            max_position_embeddings=4096,
            hidden_size=width,
            num_attention_heads=width // 128,
            intermediate_size=width * 11008 // 4096,
        )
    )
    config.vision_config.num_hidden_layers = layers
    config._attn_implementation = "sdpa"
    with no_init_weights():  # transformers' own takes longer than all the rest
        model = hf.LlavaForConditionalGeneration(config).eval()
    # Drawing a number for each weight takes as long as both models. A prime, and each weight begins
    # elsewhere: no matrix, and no row of one, is another.
    noise = torch.randn(4_000_037)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.ndim == 1:
                parameter.fill_(float("norm" in name and name.endswith("weight")))
            else:  # unit-size activations, as trained weights give
                is_table = "embed" in name and "patch" not in name
                std = 0.02 if is_table else 1 / parameter[0].numel() ** 0.5
                values = (std * noise.roll(100_003 * number)).half().float()
                for part in parameter.flatten().split(len(values)):
                    part.copy_(values[: len(part)])
    # Only what is stored: in 16 bits, the periods of the rotations would lose digits.
    halves = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=halves)
    (folder / "tokenizer.model").write_bytes(tokenizer_model)
    (folder / "added_tokens.json").write_text(json.dumps({"<image>": IMAGE}))
    size = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    tiny.LlavaImageProcessorPil(**size).save_pretrained(folder)
    return model


@pytest.mark.skipif(
    not mx.is_available(mx.gpu) and not backend.BLAS,
    reason="takes minutes without a fast BLAS: pip install '.[train]'",
)
@pytest.mark.parametrize(
    ("layers", "width"), [(4, 2048), pytest.param(24, 4096, marks=pytest.mark.slow)]
)
def test_ids_and_logits_at_real_shapes(layers, width, llama_tokenizer_model, tmp_path):
    import sentencepiece
    from transformers.image_utils import load_image

    path = shared_data("images/extreme_ironing.jpg")
    reference = write_checkpoint(tmp_path, llama_tokenizer_model, layers, width)
    model, processor = load(tmp_path, dtype="float32")
    prompt = "USER: <image>\nWhat is in this picture? ASSISTANT:"
    spm = sentencepiece.SentencePieceProcessor(model_proto=llama_tokenizer_model)
    before, after = (spm.encode(piece) for piece in prompt.split("<image>"))
    images = tiny.LlavaImageProcessorPil.from_pretrained(tmp_path)
    inputs = processor(prompt, path, raw=True)
    ids = [1, *before, *[IMAGE] * 576, *after]
    assert inputs.input_ids[0].tolist() == ids
    with torch.no_grad():
        pixels = images(load_image(str(path)), return_tensors="pt")["pixel_values"]
        theirs = reference(input_ids=torch.tensor([ids]), pixel_values=pixels).logits.numpy()
    ours = np.array(model(**inputs))
    assert np.abs(ours - theirs).max() < 3e-5
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()
