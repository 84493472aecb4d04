"""Models that know videos read them as transformers does: ids, pixels, logits and words."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle: pip install '.[test]'")
tiny = pytest.importorskip("tests.tiny")

from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # noqa: E402

from mlx_llava import generate, stream_generate  # noqa: E402
from mlx_llava.checkpoint.save import save  # noqa: E402
from mlx_llava.generation.jobs import batch_generate  # noqa: E402
from mlx_llava.generation.prompt_cache import PromptCache  # noqa: E402
from mlx_llava.generation.steps import generate_step  # noqa: E402
from mlx_llava.inputs.messages import Message  # noqa: E402
from mlx_llava.inputs.video import Video  # noqa: E402
from tests.conftest import MACHINES, as_on  # noqa: E402
from tests.conftest import load_as_stored as load  # noqa: E402

TOLERANCE = 3e-5
COLOURS = {"image_mean": [0.5, 0.42, 0.36], "image_std": [0.31, 0.22, 0.4]}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for kind in ['image', 'video'] %}"
    "{% for c in message['content'] | selectattr('type', 'equalto', kind) %}"
    "{{ '<' + kind + '>\n' }}{% endfor %}{% endfor %}"
    "{% for c in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ c['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True)
class Case(tiny.Case):
    """A tiny checkpoint that knows videos; `shown` are the marks of each row."""

    shown: tuple[str, ...] = ("v",)
    frames: int = 5

    @property
    def kind(self) -> str:
        return "LlavaNextVideo" if self.next else "LlavaOnevision"

    def marks(self) -> list[list[str]]:
        return [["<image>" if mark == "i" else "<video>" for mark in row] for row in self.shown]


VOCABULARY = {"vocab_size": 324}
VIDEO = {"video_token_index": 320}
ONEVISION = {
    "onevision": True,
    "family": "qwen2",
    "text": VOCABULARY,
    "vision": tiny.SIGLIP,
    "top": {**tiny.INTERLEAVE, **VIDEO},
}
CASES = (
    Case("next_video", next=True, text=VOCABULARY, top=VIDEO),
    Case("next_two", next=True, text=VOCABULARY, top=VIDEO, shown=("vv",), frames=3),
    Case("next_mixed", next=True, text=VOCABULARY, top=VIDEO, shown=("ivi", "", "vv", "v")),
    Case("next_image_alone", next=True, text=VOCABULARY, top=VIDEO, shown=("i", "v"), frames=4),
    Case(
        "next_stride",
        next=True,
        family="mistral",
        text={**VOCABULARY, "sliding_window": 40},
        vision={"image_size": 35, "patch_size": 5},
        top={**VIDEO, "spatial_pool_stride": 3, "vision_feature_layer": [1, -2]},
        shown=("vi", "iv"),
        frames=9,
    ),
    Case("onevision", **ONEVISION),
    Case("onevision_mixed", **ONEVISION, shown=("iv", "", "ivi", "vv"), frames=3),
    Case(
        "onevision_even",
        **{**ONEVISION, "vision": {**tiny.SIGLIP, "patch_size": 5}},
        shown=("vv", "i"),
        frames=9,
    ),
)


def processors(case: Case):
    """transformers' processor for texts and images, and its image processor for frames."""
    images = tiny.make_processor(case)
    images.tokenizer.add_tokens(["<video>"], special_tokens=True)
    images.chat_template, images.video_token = TEMPLATE, None  # whose marks are counted here
    side = case.config().vision_config.image_size
    if case.next:
        size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    else:
        size = {"size": {"height": side, "width": side}, "do_center_crop": False}
    return images, CLIPImageProcessorPil(**size, **COLOURS)


def write(case: Case, folder: Path):
    model = tiny.make_model(case)
    model.save_pretrained(folder)
    images, frames = processors(case)
    images.save_pretrained(folder)
    # As transformers' video processor writes it.
    kept = {"size", "resample", "rescale_factor", *COLOURS, *(["crop_size"] if case.next else [])}
    settings = {key: value for key, value in frames.to_dict().items() if key in kept}
    kind = f"{case.kind}VideoProcessor"
    settings |= {"video_processor_type": kind, "do_center_crop": True if case.next else None}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(settings))
    return model


def rows(case: Case):
    """Raw prompts, and of each what its marks stand for."""
    prompts, shown = [], []
    for row, marks in enumerate(case.marks()):
        text = "".join(f"{i}{mark}\n" for i, mark in enumerate(marks))
        prompts.append(f"USER: {text}{tiny.CORPUS[row % 3][: 9 + 8 * row]} ASSISTANT:")
        shown.append(
            [film(case, row, i) if m == "<video>" else image(row, i) for i, m in enumerate(marks)]
        )
    return prompts, shown


def film(case: Case, row: int, seed: int) -> Video:
    width, height = tiny.SIZES[(row + seed) % 4]
    return Video(tuple(tiny.picture(width, height, 7 * seed + i) for i in range(case.frames)))


def image(row: int, seed: int):
    return tiny.picture(*tiny.SIZES[(row + seed + 1) % 5], seed=seed)


def reference_inputs(case: Case, prompts, shown):
    images, frames = processors(case)
    config = case.config()
    patches = config.vision_config.image_size // config.vision_config.patch_size
    if case.next:
        count = case.frames * (patches // config.spatial_pool_stride) ** 2
    else:
        count = case.frames * (-(-patches // 2)) ** 2 + 1
    texts = [prompt.replace("<video>", "<video>" * count) for prompt in prompts]
    pictures = [[one for one in row if not isinstance(one, Video)] for row in shown]
    flat = [one for row in pictures for one in row]
    given = (flat if case.next else pictures) if flat else None
    batch = images(text=texts, images=given, padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    films = [one for row in shown for one in row if isinstance(one, Video)]
    if films:
        read = [frames(list(one.frames), return_tensors="pt")["pixel_values"] for one in films]
        batch["pixel_values_videos"] = torch.stack(read)
    return batch


def max_error(ours: mx.array, theirs: np.ndarray) -> float:
    return float(np.abs(np.array(ours.astype(mx.float32)) - theirs).max())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ids_pixels_logits_and_words(case, tmp_path):
    reference = write(case, tmp_path)
    model, processor = load(tmp_path)
    prompts, shown = rows(case)
    batch = reference_inputs(case, prompts, shown)
    inputs = processor(prompts, shown, raw=True)
    mask = batch["attention_mask"].numpy() > 0
    assert (inputs.input_ids[mask] == batch["input_ids"].numpy()[mask]).all()
    check_pixels(inputs, batch, shown)
    with torch.no_grad():
        logits = reference(**batch).logits.numpy()
        alone = reference_inputs(case, prompts[:1], shown[:1])
        said = reference.generate(**alone, max_new_tokens=32, do_sample=False)
    tokens = said[0, alone["input_ids"].shape[1] :].tolist()
    first = processor(prompts[0], shown[0], raw=True)
    for machine in MACHINES:
        with as_on(machine):
            ours = np.array(model(**inputs).astype(mx.float32))
            assert np.abs(ours - logits)[mask].max() < TOLERANCE
            steps = generate_step(model.embed(**first), model.language_model, max_tokens=32)
            assert [token for token, _ in steps] == tokens


def check_pixels(inputs, batch, shown):
    """Tiles in reading order, of which transformers has images and videos apart."""
    tiles = iter(np.split(inputs.pixel_values, np.cumsum(inputs.image_tiles)[:-1]))
    pictures = iter(batch.get("pixel_values", ()))
    films = iter(batch.get("pixel_values_videos", ()))
    for one in (one for row in shown for one in row):
        theirs = next(films if isinstance(one, Video) else pictures)
        theirs = theirs[theirs.flatten(1).any(1)].numpy()  # less tiles of padding
        assert np.array_equal(next(tiles).transpose(0, 3, 1, 2), theirs)


@pytest.fixture(scope="module", params=["next_mixed", "onevision_mixed"])
def mixed(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    case = next(case for case in CASES if case.name == request.param)
    write(case, folder)
    return case, *load(folder)


def test_templates_put_images_before_videos(mixed):
    case, _, processor = mixed
    one, other = film(case, 0, 1), image(0, 2)
    parts = [{"type": "video", "video": one}, {"type": "image", "image": other}]
    conversation = [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]
    inputs = processor(conversation)
    assert re.fullmatch(
        r".*USER: <image x \d+>\n<video x \d+>\nWhat\? ASSISTANT:", inputs.prompts[0], re.DOTALL
    )
    assert np.array_equal(inputs.input_ids, processor("What?", other, video=one).input_ids)
    assert inputs.videos[0][:1] == (case.frames,)
    marked = processor("<video> or <image>?", other, video=one)
    assert re.search(r"<video x \d+> or <image x \d+>\?", marked.prompts[0])
    with pytest.raises(ValueError, match="1 <video> marks but 0 videos were given"):
        processor("What is in <video>?")


def test_what_is_learned_begins_as_the_prompt_does(mixed):
    case, _, processor = mixed
    one, other = film(case, 0, 1), image(0, 2)
    turns = [Message("user", "What?", images=2), Message("assistant", "A dog.")]
    expected = processor("What?", other, video=one)
    for shown in ([one, other], [other, one]):  # whose order is the template's
        ids, learned, images = processor.learnable(turns, shown)
        prompt = expected.input_ids[0].tolist()
        assert (ids[: len(prompt)], learned.index(True)) == (prompt, len(prompt))
        tiles = processor.image_processor.batch([images])
        assert np.array_equal(tiles.pixel_values, expected.pixel_values)
        assert tiles.image_sizes == expected.image_sizes
    told = processor.learnable([Message("user", "<video> is a tag"), turns[1]], [])
    assert not processor.config.are_placeholders(np.array(told.ids)).any()


def test_videos_are_known_again_by_their_pixels(mixed):
    case, model, processor = mixed
    cache, films = PromptCache(model), [film(case, 0, i) for i in range(2)]
    options = {"max_tokens": 5}
    expected = [generate(model, processor, "What?", video=one, **options) for one in films]
    for one, answer in zip(films * 2, expected * 2, strict=True):
        *_, last = stream_generate(
            model, processor, "What?", video=one, prompt_cache=cache, **options
        )
        assert last.answer == answer
    assert last.cached_tokens == last.prompt_tokens - 1
    images = [None, [image(0, 1)], [image(0, 2), image(1, 2)], [films[0], image(0, 3)], [films[1]]]
    prompts = ["Hello", "What?", "Which?", "Both?", "What?"]
    alone = [
        generate(model, processor, prompt, shown, **options)
        for prompt, shown in zip(prompts, images, strict=True)
    ]
    assert batch_generate(model, processor, prompts, images, **options) == alone


def test_a_saved_model_reads_the_same(mixed, tmp_path):
    case, model, processor = mixed
    save(model, processor, tmp_path / "saved")
    again, reader = load(tmp_path / "saved")
    prompts, shown = rows(case)
    ours, theirs = processor(prompts, shown, raw=True), reader(prompts, shown, raw=True)
    assert np.array_equal(ours.pixel_values, theirs.pixel_values)
    assert mx.array_equal(model(**ours), again(**theirs))
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["video_token_index"] == 320
    assert config["architectures"] == [f"{case.kind}ForConditionalGeneration"]


def test_fewer_tokens_are_of_each_frame(mixed):
    case, model, processor = mixed
    inputs = processor("What?", image(0, 1), video=film(case, 0, 1), image_tokens=2)
    assert inputs.image_tokens == (2, 2 * case.frames)
    *_, last = stream_generate(model, processor, inputs, max_tokens=3)
    assert last.image_tokens == 2 + 2 * case.frames
    every = processor("What?", video=film(case, 0, 1), image_tokens=10**6)
    assert mx.array_equal(model(**every), model(**processor("What?", video=film(case, 0, 1))))
