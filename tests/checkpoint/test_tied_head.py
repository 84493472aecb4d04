"""A stored output layer that is not the embedding is never dropped, whatever config.json says."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_llava.checkpoint.convert import Quantization, convert
from mlx_llava.checkpoint.save import save
from tests.conftest import load_as_stored as load

torch = pytest.importorskip("torch", reason="the oracle: pip install '.[test]'")
tiny = pytest.importorskip("tests.tiny")
layouts = pytest.importorskip("tests.layouts")
hf = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
FLAGS = (None, False, True)


@pytest.fixture(scope="module", params=[False, True], ids=["llava", "llava_next"])
def saved(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny.save(tiny.Case("head", next=request.param), folder)
    return folder


def write(saved: Path, folder: Path, top: bool | None, text: bool | None, head: str) -> Path:
    """A copy with other flags, and a head that is its own, the embedding's, or left out."""
    folder.mkdir()
    for path in saved.iterdir():
        (folder / path.name).symlink_to(path)
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    data = json.loads((saved / "config.json").read_text())
    for section, flag in ((data, top), (data["text_config"], text)):
        section.pop("tie_word_embeddings", None)
        if flag is not None:
            section["tie_word_embeddings"] = flag
    (folder / "config.json").write_text(json.dumps(data))
    tensors = safetensors.load_file(saved / "model.safetensors")
    own = tensors.pop(HEAD)
    if head != "none":
        tensors[HEAD] = own if head == "own" else tensors[EMBEDDING].clone()
    if head == "alone":
        del tensors[EMBEDDING]
    safetensors.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def ours(folder: Path) -> np.ndarray:
    model, _ = load(folder)
    return np.array(model.language_model(mx.array([[5, 9, 40]])))


def theirs(folder: Path) -> np.ndarray:
    model = hf.AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 9, 40]])).logits.numpy()


@pytest.mark.parametrize("top", FLAGS)
@pytest.mark.parametrize("text", FLAGS)
def test_a_stored_head_is_used(saved, top, text, tmp_path):
    folder = write(saved, tmp_path / "own", top, text, "own")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = ours(folder)
    assert ["the stored one is used" in str(w.message) for w in caught] == [True] * bool(
        top or text
    )
    assert np.abs(found - theirs(folder)).max() < 1e-4


@pytest.mark.parametrize(("top", "text"), [(True, None), (None, True), (True, True)])
def test_a_head_that_is_not_stored_is_the_embedding(saved, top, text, tmp_path):
    both = write(saved, tmp_path / "both", True, True, "none")
    assert (
        np.abs(ours(write(saved, tmp_path / "none", top, text, "none")) - theirs(both)).max() < 1e-4
    )
    model, _ = load(write(saved, tmp_path / "same", top, text, "embedding"))
    assert "lm_head" not in model.language_model
    assert model.config.tie_word_embeddings
    assert model.config.text_config.tie_word_embeddings


def test_a_head_without_an_embedding_is_both(saved, tmp_path):
    folder = write(saved, tmp_path / "alone", True, True, "alone")
    assert np.abs(ours(folder) - theirs(folder)).max() < 1e-4


def test_a_head_that_nothing_ties_is_missing(saved, tmp_path):
    folder = write(saved, tmp_path / "none", False, None, "none")
    with pytest.raises(ValueError, match=r"1 tensors are missing: language_model.lm_head.weight"):
        load(folder)


def test_what_is_saved_again_says_what_holds(saved, tmp_path):
    with pytest.warns(UserWarning, match="the stored one is used"):
        model, processor = load(write(saved, tmp_path / "own", True, False, "own"))
    save(model, processor, tmp_path / "again")
    assert np.array_equal(ours(tmp_path / "again"), ours(saved))
    assert np.abs(theirs(tmp_path / "again") - theirs(saved)).max() < 1e-5


def test_a_quantised_head_is_used_too(tmp_path):
    """As mlx-vlm converted what transformers 4.50 says of LLaVA 1.5."""
    text = {"hidden_size": 64, "intermediate_size": 64}
    tiny.save(tiny.Case("quantised", text=text), tmp_path / "hf")
    folder = tmp_path / "mlx"
    convert(tmp_path / "hf", folder, quantization=Quantization(bits=4, group_size=32))
    expected = ours(folder)
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, "tie_word_embeddings": True}))
    with pytest.warns(UserWarning, match="the stored one is used"):
        assert np.array_equal(ours(folder), expected)


def test_the_originals_head_is_used_too(tmp_path):
    model = tiny.make_model(layouts.case())
    state = layouts.state_dict(model)
    config = layouts.original_config(model, tie_word_embeddings=True)
    folder = layouts.write_folder(tmp_path / "v16", layouts.to_original(state), config)
    with pytest.warns(UserWarning, match="the stored one is used"):
        loaded, _ = load(folder)
    head = np.array(loaded.language_model.lm_head.weight)[: layouts.VOCABULARY]
    assert np.array_equal(head, state[HEAD][: layouts.VOCABULARY].numpy())
