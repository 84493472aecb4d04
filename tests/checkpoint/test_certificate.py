"""Every named checkpoint is read right, and the page that says so is current."""

from __future__ import annotations

import re

import numpy as np
import pytest

from mlx_llava import convert, load
from tests.conftest import ROOT, shared_data

pytest.importorskip("torch", reason="the oracle: pip install '.[test]'")
pytest.importorskip("gguf")
certificate = pytest.importorskip("tests.certificate")
ROWS = certificate.ROWS
PAGE = ROOT / "docs" / "certificate.md"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_published_checkpoint_is_read_right(row):
    found = certificate.certify(row)
    assert found.template == row.template
    assert (found.ends, found.mode, found.tokens) == (row.ends, row.mode, row.tokens)
    assert found.layer == (-1 if row.layout == "gguf" else row.layer)  # GGUF's lack the last
    lines = PAGE.read_text(encoding="utf-8").splitlines(keepends=True)
    assert certificate.line(row) in lines, "run scripts/make_certificate.py"


#: One of each layout and kind of tokenizer; a linear projector transformers has not.
CONVERTED = (
    *("liuhaotian/llava-v1.5-13b", "liuhaotian/llava-v1.5-7b-lora"),
    *("liuhaotian/llava-v1.6-vicuna-13b", "lmms-lab/llava-next-interleave-qwen-0.5b"),
    *("TheBloke/llava-v1.5-13B-GPTQ", "TheBloke/llava-v1.5-13B-AWQ", "mys/ggml_llava-v1.5-7b"),
)


@pytest.mark.parametrize("name", CONVERTED)
def test_transformers_opens_what_is_converted_and_says_the_same(name, tmp_path):
    import torch
    import transformers as hf

    row = next(row for row in ROWS if row.name == name)
    config = certificate.scaled(row)
    write = certificate.WRITERS[row.layout]
    written = write(row, config, certificate.reference(config), tmp_path)
    out = tmp_path / "out"
    convert(written.path, out, dequantize=True, dtype="float32", **written.source)
    model, processor = load(out, dtype="float32")
    theirs, report = hf.AutoModelForImageTextToText.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    picture = certificate.tiny.picture(500, 333)
    inputs = processor(certificate.QUESTION, picture)
    prompt = re.sub(r"<image x \d+>", "<image>", inputs.prompts[0])
    reader = hf.AutoProcessor.from_pretrained(out)
    prompt = prompt.removeprefix(reader.tokenizer.bos_token or "")
    batch = reader(text=prompt, images=picture, return_tensors="pt")
    assert batch["input_ids"].tolist() == inputs.input_ids.tolist()
    with torch.no_grad():
        expected = theirs(**batch, logits_to_keep=certificate.LAST).logits[0].numpy()
    ours = certificate.our_logits(model, inputs)
    assert np.abs(ours - expected).max() < certificate.TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("row", [row for row in ROWS if row.real], ids=lambda row: row.name)
def test_settings_are_those_of_the_published_files(row):
    published = row.read_published(shared_data("published"))
    added = ("_name_or_path", "transformers_version", "image_seq_length")
    for key in added if row.real.startswith("dumps/") else ():
        published.pop(key, None)  # what the version that wrote the dump put there
    assert {key: row.config[key] for key in published if key in row.config} == published
    assert {*row.config} <= {*published, *added}


def test_the_page_has_these_rows():
    text = PAGE.read_text(encoding="utf-8")
    above = certificate.introduction()
    assert text.startswith(above)
    names = [line.split(" | ")[0].removeprefix("| ") for line in text[len(above) :].splitlines()]
    assert names == [row.name for row in ROWS]
