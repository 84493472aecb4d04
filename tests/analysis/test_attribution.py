"""What `explain` shows is what transformers computes, and lies where the picture has it."""

from __future__ import annotations

import html
import io
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from mlx_llava import load
from mlx_llava.analysis import report
from mlx_llava.analysis.attribution import folded
from mlx_llava.analysis.boxes import feature_boxes, heat_map, patch_boxes
from mlx_llava.analysis.heads import given_words, take_head
from mlx_llava.analysis.trace import trace
from mlx_llava.explain import explain, logit_lens, main, mask_effect, nearest_words
from mlx_llava.files import check_output
from mlx_llava.inputs.image_processor import ImageProcessor
from mlx_llava.model.config import LlavaConfig
from tests.conftest import GOLDENS, ROOT, SHAPES, load_as_stored

sys.path.insert(0, str(ROOT / "scripts"))
import shapes

TOLERANCE = 3e-5
CASES = (
    "vicuna", "gqa", "mqa_one_row", "tied_head", "linear_rope", "llama3_rope", "head_dim",
    "attention_bias", "mistral_window", "qwen2", "layer_list", "keep_class_token", "pad", "next",
    "next_one_image", "next_mistral", "next_uneven", "text_only", "onevision_cut",
    "onevision_tied_padded",
)  # fmt: skip


@pytest.fixture(scope="module")
def embedded():
    return load()


@pytest.mark.parametrize("name", CASES)
def test_states_attention_and_logits_are_transformers(name, tmp_path):
    tiny = pytest.importorskip("tests.tiny", reason="the oracle: pip install '.[test]'")
    torch = pytest.importorskip("torch")
    case = next(case for case in tiny.CASES if case.name == name)
    case = replace(case, images=case.images[:1])
    reference = tiny.save(case, tmp_path)
    model, processor = load_as_stored(tmp_path)
    (prompt,), (pictures,) = tiny.rows(case)
    batch = tiny.reference_inputs(case)
    with torch.no_grad():
        theirs = reference(**batch, output_hidden_states=True, output_attentions=True)
    ours = trace(model, processor(prompt, pictures, raw=True))

    def check(ours, theirs):
        assert ours.dtype == np.float32
        theirs = np.stack([array.numpy() for array in theirs])[:, 0]
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() < TOLERANCE

    check(ours.hidden_states, theirs.hidden_states)
    check(ours.attention, theirs.attentions)
    check(ours.logits[None], [theirs.logits])
    if pictures:
        features = np.concatenate(ours.image_features)
        expected = (
            theirs.image_outputs.pooler_output if case.onevision else theirs.image_hidden_states
        )
        expected = np.concatenate([array.numpy() for array in expected])
        assert np.abs(features - expected.reshape(features.shape)).max() < TOLERANCE
        pixels = batch["pixel_values"]
        if case.next or case.onevision:
            pixels = torch.cat([tiles[tiles.flatten(1).any(1)] for tiles in pixels])
        states = tiny.torch_hidden_states(reference, pixels)
        assert np.abs(ours.vision_states - np.stack(states)).max() < TOLERANCE


def test_rollout_is_the_product_of_what_the_layers_pass_on(loaded):
    model, processor = loaded
    ours = trace(model, processor("What is it?", GOLDENS / "picture.png"))
    expected = np.eye(ours.attention.shape[-1])
    for layer in ours.attention:
        expected = (layer.mean(axis=0) / 2 + np.eye(len(expected)) / 2) @ expected
    assert np.allclose(ours.rollout, expected, atol=1e-5)
    assert np.allclose(ours.rollout.sum(axis=1), 1, atol=1e-5)


def test_an_explanation_is_of_what_generate_says(both):
    from mlx_llava import stream_generate

    model, processor = both
    pictures = [GOLDENS / "picture.png"] * 2
    question = "<image> or <image>?"
    parts = list(stream_generate(model, processor, question, pictures, max_tokens=6))
    seen = explain(model, processor, question, pictures, max_tokens=6)
    assert list(seen.tokens) == [part.token for part in parts]
    rows = seen.trace.logits[seen.trace.queries]
    assert (rows.argmax(axis=-1) == seen.tokens).all()
    logprobs = np.stack([np.array(part.logprobs) for part in parts])
    normed = rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))
    assert np.abs(normed - logprobs).max() < TOLERANCE
    for picture, count in enumerate(seen.inputs.image_tokens):
        assert seen.attention(picture).shape[2:] == (6, count)
        assert seen.rollout(picture).shape == (6, count)
        assert seen.boxes[picture].shape == (count, 4)
    everywhere = seen.trace.attention.sum(axis=-1)
    assert np.allclose(everywhere, 1, atol=1e-5)


def test_words_join_to_the_answer(embedded):
    seen = explain(*embedded, "What is in this picture?", SHAPES)
    assert seen.answer == "A small black star, a large red triangle and a large orange square."
    assert len(seen.words) == len(seen.tokens) == seen.attention().shape[2]


def test_pictures_inside_a_conversation_are_refused(embedded):
    shape = SHAPES
    parts = [{"type": "image", "image": str(shape)}, {"type": "text", "text": "What is it?"}]
    with pytest.raises(ValueError, match="1 pictures and 0 were given as image"):
        explain(*embedded, [{"role": "user", "content": parts}])


def test_one_prompt_at_a_time(loaded):
    model, processor = loaded
    with pytest.raises(ValueError, match="there are 2"):
        trace(model, processor(["a", "b"]))


# Where features come from


SIDE, PATCH = 28, 7


def image_processor(mode: str, **changes) -> ImageProcessor:
    """Cuts pictures into 4 x 4 patches."""
    pinpoints = tuple((h * SIDE, w * SIDE) for h, w in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)))
    config = {
        "model_type": "llava_next" if mode == "anyres" else "llava",
        "image_grid_pinpoints": pinpoints if mode == "anyres" else None,
        "vision_config": {"image_size": SIDE, "patch_size": PATCH, **changes.pop("vision", {})},
        **changes.pop("config", {}),
    }
    config = {key: value for key, value in config.items() if value is not None}
    return ImageProcessor(LlavaConfig.from_dict(config), mode, **{"size": SIDE, **changes})


def coordinates(width: int, height: int) -> Image.Image:
    """A picture that has each pixel's place in its colour: x is red, y is green."""
    x, y = np.meshgrid(np.linspace(20, 230, width), np.linspace(20, 230, height))
    blue = np.full_like(x, 255)
    return Image.fromarray(np.stack([x, y, blue], axis=-1).round().astype(np.uint8))


MODES = {
    "crop": image_processor("crop"),
    "crop of a larger edge": image_processor("crop", size=40),
    "crop of a smaller edge": image_processor("crop", size=20),
    "squashed": image_processor("crop", size=(SIDE, SIDE)),
    "pad": image_processor("pad"),
    "anyres": image_processor("anyres"),
    "anyres, scaled down": image_processor(
        "anyres",
        config={
            "model_type": "llava_onevision",
            "vision_aspect_ratio": "anyres_max_1",
            "vision_feature_select_strategy": "default",
            "vision_feature_layer": -2,
        },
        vision={"model_type": "clip_vision_model"},
    ),
    "uneven patches": image_processor("pad", vision={"image_size": 28, "patch_size": 9}),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "size", [(200, 150), (150, 200), (300, 150), (150, 300), (28, 28), (61, 60)]
)
def test_a_patch_shows_the_part_of_the_picture_that_its_box_says(mode, size):
    width, height = size
    processor = MODES[mode]
    picture = coordinates(width, height)
    tiles = np.stack([np.asarray(tile, np.float32) for tile in processor.tiles(picture)])
    boxes = patch_boxes(processor, (height, width))
    n = boxes.shape[1]
    patch = processor.config.vision_config.patch_size
    checked = 0
    for tile, row, column in np.ndindex(*boxes.shape[:3]):
        left, top, right, bottom = boxes[tile, row, column]
        pixels = tiles[tile, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        if left < 0 or top < 0 or right > width or bottom > height:
            continue
        expected = (
            20 + 210 * ((left + right) / 2 - 0.5) / (width - 1),
            20 + 210 * ((top + bottom) / 2 - 0.5) / (height - 1),
        )
        # A resized edge may be off by what bicubic filters do there.
        assert pixels[..., :2].mean(axis=(0, 1)) == pytest.approx(expected, abs=5)
        checked += 1
    assert checked >= n


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(200, 150), (90, 400), (28, 28)])
def test_every_feature_has_a_box_and_maps_lose_nothing(mode, size):
    width, height = size
    processor = MODES[mode]
    boxes = feature_boxes(processor, (height, width))
    assert boxes.shape == (processor.num_tokens((height, width)), 4)
    placed = ~np.isnan(boxes[:, 0])
    values = np.random.default_rng(0).random(len(boxes))
    inside = np.clip(np.minimum(boxes[:, 2:], size) - np.maximum(boxes[:, :2], 0), 0, None)
    share = inside.prod(axis=1) / (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    heat = heat_map(values, boxes, (height, width), longest=100)
    assert max(heat.shape) == 100
    assert heat.sum() == pytest.approx((values * share)[placed].sum(), rel=1e-5)
    assert (heat >= 0).all()


def test_lines_and_class_tokens_have_no_place():
    newlines = feature_boxes(MODES["anyres"], (56, 56))
    assert np.isnan(newlines[:, 0]).sum() == 8  # a 2 x 2 grid of tiles of 4 rows each
    full = image_processor("crop", config={"vision_feature_select_strategy": "full"})
    boxes = feature_boxes(full, (28, 28))
    assert np.isnan(boxes[0]).all()
    assert boxes[1].tolist() == [0, 0, 7, 7]


def test_boxes_of_a_grid_that_was_scaled_down_touch():
    processor = MODES["anyres, scaled down"]
    size = (56, 56)  # 8 rows of 8 patches become 4 of 4 where one tile is the most
    boxes = feature_boxes(processor, size)[16:]
    boxes = boxes[~np.isnan(boxes[:, 0])]
    assert np.allclose(boxes, feature_boxes(MODES["pad"], size), atol=1e-4)


def test_every_feature_of_siglip_has_its_place():
    """Four patches of 7 in a row of 31 pixels: 3 of them show nowhere."""
    vision = {"model_type": "siglip_vision_model", "image_size": 31}
    full = {"vision_feature_select_strategy": "full"}
    processor = image_processor("crop", vision=vision, config=full, size=(31, 31))
    boxes = feature_boxes(processor, (62, 31))
    assert len(boxes) == 16 == processor.num_tokens((62, 31))
    assert boxes[[0, 1, 4, -1]].tolist() == [
        [0, 0, 7, 14],
        [7, 0, 14, 14],
        [0, 14, 7, 28],
        [21, 42, 28, 56],
    ]


def test_a_map_puts_a_patch_where_it_is():
    boxes = feature_boxes(MODES["pad"], (100, 200))
    values = np.zeros(len(boxes))
    values[4] = 1  # the second row's first patch: pixels (0, 0) to (50, 50)
    heat = heat_map(values, boxes, (100, 200), longest=40)
    assert heat.shape == (20, 40)
    assert heat[:10, :10].sum() == pytest.approx(1)


# What the embedded model looks at


def scenes(count: int):
    """Pictures with questions that one word answers, and where the objects are: (O, 36)."""
    for number in range(count):
        chance = Random(f"explain {number}")
        scene = shapes.make_scene(chance, "seen")
        question = shapes.ask(chance, scene, ("colour", "shape", "size")[number % 3])
        rows, columns = np.divmod(np.arange(36), 6)
        cells = rows // 2 * 3 + columns // 2
        objects = np.array([cells == thing.cell for thing in scene.things])
        yield scene, question, objects


def test_the_object_that_is_asked_about_is_looked_at(embedded):
    shares, largest = [], 0
    for scene, question, objects in scenes(40):
        seen = explain(*embedded, question.text, scene.draw())
        attention = seen.attention()[:, :, 0].mean(axis=(0, 1))
        share = (objects * attention).sum(axis=1) / attention.sum()
        shares.append(share[0])  # chance: 4 of 36 patches
        largest += share.argmax() == 0
    assert np.mean(np.array(shares) > 1 / 9) >= 0.95
    assert np.mean(shares) > 0.3
    assert largest >= 36


def test_the_object_that_is_asked_about_is_missed_when_it_is_masked(embedded):
    found = 0
    for scene, question, _ in scenes(20):
        seen = explain(*embedded, question.text, scene.draw())
        effect = mask_effect(*embedded, seen, window=2)
        assert effect.drops.shape == (9, len(seen.tokens))
        found += effect.drops[:, 0].argmax() == scene.things[0].cell
    assert found >= 18


def test_masking_is_what_the_masked_picture_gives(both):
    """With several pictures, in windows, one of them by hand."""
    model, processor = both
    pictures = [Image.open(GOLDENS / "picture.png"), coordinates(50, 70)]
    seen = explain(model, processor, "<image> or <image>?", pictures, max_tokens=4)
    effect = mask_effect(model, processor, seen, picture=1, window=2)
    assert len(effect.boxes) == 4
    left, top, right, bottom = effect.boxes[2]
    masked = np.array(pictures[1])
    box = np.s_[
        max(0, int(np.floor(top))) : int(np.ceil(bottom)),
        max(0, int(np.floor(left))) : int(np.ceil(right)),
    ]
    masked[box] = np.median(masked, axis=(0, 1)).astype(int)
    inputs = processor("<image> or <image>?", [pictures[0], masked])
    after = trace(model, inputs, seen.tokens).logits[seen.trace.queries]
    before = seen.trace.logits[seen.trace.queries]
    tokens = np.arange(4), np.array(seen.tokens)

    def logprobs(logits):
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    expected = logprobs(before)[tokens] - logprobs(after)[tokens]
    assert np.abs(effect.drops[2] - expected).max() < 1e-4
    assert np.abs(expected).max() > 1e-3
    with pytest.raises(ValueError, match="window is 0"):
        mask_effect(model, processor, seen, window=0)


# Words


def test_nearest_words_are_those_of_the_table(embedded):
    model, processor = embedded
    ids = processor.tokenizer.encode("a large red star")[1:]
    table = np.array(model.language_model.model.embed_tokens.weight)
    found = nearest_words(model, processor, 3 * table[ids] + 1e-3, count=2)
    assert [row[0][0] for row in found] == [processor.tokenizer.text_of(i) for i in ids]
    assert all(row[0][1] == pytest.approx(1, abs=1e-3) for row in found)
    assert all(row[1][1] < row[0][1] for row in found)


def test_the_lens_ends_with_what_the_model_says(both):
    model, processor = both
    seen = explain(model, processor, "What is it?", GOLDENS / "picture.png", max_tokens=5)
    tokens, probabilities = logit_lens(model, seen.trace.hidden_states[:, seen.trace.queries], 3)
    layers = len(model.language_model.layers)
    assert tokens.shape == probabilities.shape == (layers + 1, 5, 3)
    assert tuple(tokens[-1, :, 0]) == seen.tokens
    assert (np.diff(probabilities, axis=-1) <= 0).all()
    logits = seen.trace.logits[seen.trace.queries]
    expected = np.exp(logits.max(axis=-1)) / np.exp(logits).sum(axis=-1)
    assert np.allclose(probabilities[-1, :, 0], expected, atol=1e-5)


def test_text_of_a_token_keeps_its_space(embedded):
    tokenizer = embedded[1].tokenizer
    ids = tokenizer.encode("a red star.")
    assert tokenizer.text_of(ids[0]) == "<s>"
    assert "".join(map(tokenizer.text_of, ids[1:])).strip() == "a red star."


# Figures, reports and Jupyter


def test_a_report_begins_with_the_answer_and_folds_what_is_repeated(tmp_path, capsys):
    Image.effect_noise((200, 100), 90).convert("RGB").save(tmp_path / "wide.png")
    out = tmp_path / "report.html"
    arguments = ["--image", str(tmp_path / "wide.png"), "--prompt", "What is in this picture?"]
    assert main([*arguments, "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    (heading,) = re.findall("<h1>(.*)</h1>", page)
    times = [int(n) for n in re.findall(r"\((\d+) times\)", heading)]
    single = len(heading.split()) - 3 * len(times)
    assert single + sum(times) == len(capsys.readouterr().out.split())
    assert "this is the embedded model, which only knows drawings" in page
    assert re.findall("<h2>(.*?)</h2>", page)[0] == "Where it looked"


def test_repeated_words_are_one():
    assert folded(["a", "b", "b", "b", "a"]) == {0: "a", 1: "b (3 times)", 4: "a"}


def test_what_the_model_has_not_read_is_left_as_it_is(embedded):
    from mlx_llava.analysis import plots

    wide = Image.open(SHAPES).convert("RGB").resize((400, 200))
    seen = explain(*embedded, "What is it?", wide, max_tokens=2)
    figure = plots.plot_overview(seen)
    drawn = np.asarray(figure.subfigs[0].subfigs[1].axes[0].images[-1].get_array().filled(np.nan))
    is_outside = np.isnan(drawn)
    columns = drawn.shape[1]
    assert is_outside[:, : columns // 4 - 1].all()
    assert not is_outside[:, columns // 4 + 1 : -columns // 4 - 1].any()
    words = plots.plot_attention(seen, largest=plots.largest_share(seen)).axes
    rollout = plots.plot_rollout(seen, largest=plots.largest_share(seen)).axes
    limits = {axes.images[-1].get_clim() for axes in [words[0], rollout[0]]}
    assert len(limits) == 1


def test_the_command_draws_a_picture(tmp_path, capsys):
    out = tmp_path / "new" / "report.png"
    arguments = ["--image", str(SHAPES), "--prompt", "What is in this picture?", "--window", "2"]
    assert main([*arguments, "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith("A small black star")
    drawn = Image.open(out).convert("RGB")
    assert drawn.height > 1500
    assert drawn.getcolors(maxcolors=1000) is None
    assert [path.name for path in out.parent.iterdir()] == ["report.png"]
    check_output(out, "mlx_llava.explain")
    link = out.with_name("link.png")
    link.symlink_to(out)
    for image in (out, link):
        assert main([*arguments, "--image", str(image), "--out", str(out)]) == 2
        assert "report.png is read, and cannot be written" in capsys.readouterr().err


def test_the_command_writes_a_page_that_needs_nothing_else(tmp_path):
    out = tmp_path / "report.html"
    arguments = ["--image", str(SHAPES), "--image", str(SHAPES), "--max-tokens", "3"]
    assert main([*arguments, "--prompt", "<script>$a<image>$ <image>", "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;$a" in page
    assert page.count("<h2>") == page.count("data:image/png;base64,") == 2 + 2 * 3
    assert page.index("<h1>") < page.index("<h2>")
    assert "http" not in page
    check_output(out, "mlx_llava.explain")


@pytest.mark.parametrize("name", ["photo.png", "page.html"])
def test_nothing_but_a_report_is_written_over(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(SHAPES, name)
    if name == "page.html":
        Path(name).write_text("<title>How I use mlx_llava.explain</title>")
    before = Path(name).read_bytes()
    assert main(["--prompt", "What is it?", "--out", name]) == 2
    assert "mlx_llava.explain did not write it" in capsys.readouterr().err
    assert Path(name).read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "report.pdf"], "report.pdf must end in .png or .html"),
        (["--out", "report.png", "--image", "none.png"], "There is no image none.png"),
        (["--out", "report.png", "--image", str(SHAPES), "--window", "-1"], "window is -1"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["--prompt", "What is it?", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 0
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("mlx_llava.analysis.report.find_spec", lambda name: None)
    assert main(["--prompt", "What is it?", "--out", "report.png"]) == 2
    assert "pip install 'mlx_llava[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["loaded_next", "embedded"])
def test_every_figure_shows_something(mode, request):
    from mlx_llava.analysis import flow, lessons, plots

    model, processor = request.getfixturevalue(mode)
    seen = explain(model, processor, "What is it?", GOLDENS / "picture.png", max_tokens=3)
    effect = mask_effect(model, processor, seen, window=2)
    nearest = nearest_words(model, processor, seen.trace.image_features[0], 1)
    head = take_head(model, seen.trace, 0, 0)
    given = [words[0] for words in given_words(model, processor, head.writes[seen.positions[0]])]
    labels = [str(i) for i in range(len(seen.trace.logits))]
    figures = [
        plots.headline(plots.plot_pictures(seen.images), "$ is no mathematics"),
        lessons.plot_lights(seen, head, 1, given),
        lessons.plot_steps(head, int(seen.trace.queries[1]), labels),
        plots.plot_pictures(seen.images),
        plots.plot_attention(seen, layers=[0]),
        plots.plot_heads(seen, 0),
        plots.plot_rollout(seen, words=[1, 2]),
        plots.plot_mask_effect(seen, effect),
        plots.plot_nearest_words(seen, [words[0][0] for words in nearest]),
        flow.plot_flow(model, seen),
        plots.plot_shares({"one": np.full((3, 2), 0.5), "two": np.full((5, 2), 0.1)}, chance=0.2),
        plots.plot_losses([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "valid_loss": 3.0}]),
    ]
    for figure in figures:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        assert Image.open(buffer).convert("RGB").getcolors(maxcolors=20) is None


def test_the_flow_says_how_many_columns_it_draws(embedded):
    from mlx_llava.analysis import flow

    seen = explain(*embedded, "What is it?", SHAPES, max_tokens=1)
    labels = [axes.get_xlabel() for axes in flow.plot_flow(embedded[0], seen).axes]
    assert labels.count("36 x 128, 32 columns drawn") == 2


def test_a_masked_part_is_drawn_with_its_own_value(embedded):
    from mlx_llava.analysis import plots

    seen = explain(*embedded, "What is it?", SHAPES, max_tokens=1)
    effect = mask_effect(*embedded, seen, window=3)
    drops = np.array([[1.0], [-2.0], [3.0], [4.0]])
    figure = plots.plot_mask_effect(seen, replace(effect, drops=drops))
    drawn = np.asarray(figure.axes[0].images[-1].get_array())
    half = len(drawn) // 2
    assert np.allclose(drawn[:half, :half], 1)
    assert np.allclose(drawn[:half, half:], -2)
    assert np.allclose(drawn[half:, :half], 3)
    assert np.allclose(drawn[half:, half:], 4)


def test_what_changes_nothing_is_not_drawn_as_if_it_did(embedded):
    """The colours go to a tenth of a nat at least, and the report says that nothing is there."""
    from mlx_llava.analysis import plots, report

    question = "What colour is the triangle?"
    seen = explain(*embedded, question, SHAPES, max_tokens=1)
    captions = {
        window: "changes nothing" in report.sections(*embedded, seen, window=window)[3].caption
        for window in (1, 2)
    }
    assert captions == {1: True, 2: False}
    for window, ends in ((1, plots.LEAST_DROP), (2, None)):
        effect = mask_effect(*embedded, seen, window=window)
        (shown, _) = plots.plot_mask_effect(seen, effect).axes
        assert shown.images[-1].norm.vmax == (ends or np.abs(effect.drops).max())


def test_long_texts_are_not_cut_off_in_a_report(tmp_path):
    from mlx_llava.analysis import report

    section = report.Section("Title", "a caption " * 20, 1.0, lambda figure: figure.subplots())
    report.write_report([section], "a question " * 20, "an answer " * 20, tmp_path / "report.png")
    pixels = np.asarray(Image.open(tmp_path / "report.png").convert("L"))
    assert (pixels[:, [0, 1, -2, -1]] == 255).all()


def test_inputs_and_answers_show_themselves_in_jupyter(both):
    from mlx_llava import stream_generate

    model, processor = both
    inputs = processor("Is <b>1 < 2</b>?", GOLDENS / "picture.png")
    shown = inputs._repr_html_()
    assert shown.count("data:image/png") == len(inputs.pixel_values)
    assert "&lt;b&gt;1 &lt; 2&lt;/b&gt;" in shown
    assert f"&lt;image x {inputs.image_tokens[0]}&gt;" in shown
    *_, last = stream_generate(model, processor, inputs, max_tokens=4)
    shown = last._repr_html_()
    assert html.escape(last.answer) in shown
    assert "<td>generation_tokens</td><td>4</td>" in shown
    assert "<td>prefill</td>" in shown
    assert shown.count("data:image/png") == len(inputs.pixel_values)
    assert "pixel_values" not in repr(last)
    text_only = processor("What?")
    assert "img" not in text_only._repr_html_()


@pytest.mark.parametrize("mode", ["crop", "anyres"])
def test_tiles_are_shown_as_they_were_cut(mode):
    processor = MODES[mode]
    picture = coordinates(70, 50)
    pixels = processor([picture])
    shown = processor.denormalize(pixels)
    assert (shown == np.stack([np.asarray(tile) for tile in processor.tiles(picture)])).all()


def test_letters_that_the_font_lacks_are_boxes_without_a_word():
    """And no filter of warnings but for what a report draws is changed, which threads share."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    figure.subplots().set_title("你好")
    assert report._saved(figure).startswith(b"\x89PNG")
    with pytest.raises(UserWarning, match="Glyph"):
        figure.savefig(io.BytesIO())
