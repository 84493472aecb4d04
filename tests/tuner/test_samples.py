"""Training files of any kind: what is learned of them, and that nothing is lost silently."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mlx_llava import load
from mlx_llava.inputs.chat_template import JinjaTemplate
from mlx_llava.inputs.messages import Message
from mlx_llava.inputs.processor import Processor
from mlx_llava.inputs.templates import TEMPLATES
from mlx_llava.inputs.video import load_video
from mlx_llava.train import main
from mlx_llava.tuner.data import IGNORED, Examples
from mlx_llava.tuner.samples import Film, TrainingFile, read_samples
from tests.conftest import GOLDENS, PICTURE, shared_data

LLAVA = GOLDENS / "llava"
PIRATE = "You are a pirate."
QUESTION = {"from": "human", "value": "<image>\nWhat?"}
ANSWER = {"from": "gpt", "value": "red"}
TURNS = [QUESTION, ANSWER]


def sample(*turns: dict, **keys) -> dict:
    return {"id": "1", "image": "a.png", "conversations": list(turns or TURNS), **keys}


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("a.png", "b.png"):
        Image.open(PICTURE).save(tmp_path / name)
    return tmp_path


def read(folder: Path, *entries, protect=str, lines: bool = False) -> TrainingFile:
    text = "\n".join(map(json.dumps, entries)) if lines else json.dumps(entries)
    (folder / "train.json").write_text(text)
    return read_samples(folder / "train.json", folder, protect)


MESSAGES = (Message("user", "What?", images=1), Message("assistant", "red"))
LEARNED_PIRATE = (Message("system", PIRATE), *MESSAGES)
PART = {"type": "image"}
SAME = {
    "llava": (sample(), MESSAGES),
    "roles of OpenAI": (
        sample({"from": "user", "value": "<image>\nWhat?"}, {"from": "assistant", "value": "red"}),
        MESSAGES,
    ),
    "messages": (
        {
            "messages": [
                {"role": "system", "content": PIRATE},
                {"role": "user", "content": "<image>What?"},
                {"role": "assistant", "content": "red"},
            ],
            "images": ["a.png"],
        },
        LEARNED_PIRATE,
    ),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [PART, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
            ],
            "images": "a.png",
        },
        MESSAGES,
    ),
    "parts with files": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What?"},
                        {"type": "image_url", "image_url": {"url": "a.png"}},
                    ],
                },
                {"role": "Assistant", "content": "red"},
            ],
            "images": ["a.png"],
        },
        MESSAGES,
    ),
    "developer": (
        {
            "image": "a.png",
            "messages": [{"role": "developer", "content": PIRATE}, *TURNS],
        },
        LEARNED_PIRATE,
    ),
    "bot": (sample(QUESTION, {"from": "bot", "value": "red"}), MESSAGES),
    "system turn": (sample({"from": "system", "value": PIRATE}, *TURNS), LEARNED_PIRATE),
    "system key": (sample(system=PIRATE), LEARNED_PIRATE),
    "system_prompt key": (sample(system_prompt=PIRATE), LEARNED_PIRATE),
    "system twice": (
        sample({"from": "system", "value": PIRATE}, *TURNS, system=PIRATE),
        LEARNED_PIRATE,
    ),
    "no system text": (sample({"from": "system", "value": " "}, *TURNS, system=""), MESSAGES),
    "greeting": (sample({"from": "gpt", "value": "Hi"}, *TURNS), MESSAGES),
    "no mark": (sample({"from": "human", "value": "What?"}, ANSWER), MESSAGES),
    "images, no mark": (
        sample({"from": "human", "value": "What?"}, ANSWER, image=None, images=["a.png"]),
        MESSAGES,
    ),
    "image list": (sample(image=["a.png"]), MESSAGES),
    "image and images": (sample(images=["a.png"]), MESSAGES),
}


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("name", SAME)
def test_one_conversation_in_all_ways_to_write_it(name, lines, folder):
    entry, messages = SAME[name]
    reading = read(folder, entry, lines=lines)
    assert not reading.left_out
    assert not reading.unread
    (only,) = reading.samples
    assert only.messages == messages
    assert only.images == (folder / "a.png",)


def test_pictures_in_turns_and_beside_them_keep_their_order(folder):
    parts = [{"type": "image"}, {"type": "image", "path": "b.png"}, {"type": "image"}]
    entry = sample({"role": "user", "content": parts}, ANSWER, image=["a.png", "./a.png"])
    (only,) = read(folder, entry).samples
    assert only.messages[0] == Message("user", "", images=3)
    assert [image.name for image in only.images] == ["a.png", "b.png", "a.png"]


def test_two_pictures_without_marks_go_first_in_order(folder):
    entry = sample({"from": "human", "value": "What?"}, ANSWER, image=["b.png", "a.png"])
    (only,) = read(folder, entry).samples
    assert only.messages[0] == Message("user", "What?", images=2)
    assert only.images == (folder / "b.png", folder / "a.png")


def ask(text: str, **shown) -> dict:
    return sample({"from": "human", "value": text}, ANSWER, image=None, **shown)


VIDEO_PART = {"type": "video_url", "video_url": {"url": "v.mp4"}}
VIDEOS = {
    "LLaVA-Video": (ask("<image>\nWhat?", video="v.mp4"), ["v.mp4"]),
    "LLaVA-NeXT-Video": (ask("<video>\nWhat?", video="v.mp4"), ["v.mp4"]),
    "no mark": (ask("What?", videos=["v.mp4", "frames"]), ["v.mp4", "frames"]),
    "a folder of frames": (ask("<image>\nWhat?", video="frames"), ["frames"]),
    "beside a picture": (
        {**ask("<video>, then <image>: What?", video="v.mp4"), "image": "a.png"},
        ["v.mp4", "a.png"],
    ),
    "a part": (
        sample(
            {"role": "user", "content": [VIDEO_PART, {"type": "text", "text": "What?"}]},
            ANSWER,
            image=None,
        ),
        ["v.mp4"],
    ),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_are_found_by_their_marks(name, folder):
    (folder / "v.mp4").write_bytes(b"a film")
    (folder / "frames").mkdir()
    entry, expected = VIDEOS[name]
    reading = read(folder, entry)
    assert not reading.left_out
    assert not reading.unread
    (only,) = reading.samples
    assert [
        image.path.name if isinstance(image, Film) else image.name for image in only.images
    ] == (expected)
    assert [isinstance(image, Film) for image in only.images] == [
        name != "a.png" for name in expected
    ]
    assert only.messages[0].images == len(expected)
    assert "<" not in only.messages[0].text


def test_the_mark_of_a_video_is_text_where_there_is_none(folder):
    (only,) = read(folder, sample({"from": "human", "value": "<video> is a tag"}, ANSWER)).samples
    assert only.messages[0] == Message("user", "<video> is a tag", images=1)


def test_a_film_is_learned_as_its_frames_by_a_model_that_knows_no_video(folder, loaded):
    pytest.importorskip("av", reason="videos: pip install '.[video]'")
    from tests.films import film

    _, processor = loaded
    (folder / "v.mp4").write_bytes(film(frames=9))
    frames = load_video(folder / "v.mp4", 3).frames
    for i, frame in enumerate(frames):
        frame.save(folder / f"{i}.png")
    names = [f"{i}.png" for i in range(3)]
    entries = [
        {**ask("<video>, then <image>: What?", video="v.mp4"), "image": "a.png"},
        sample({"from": "human", "value": "What?"}, ANSWER, image=[*names, "a.png"]),
    ]
    entries[1]["conversations"][0]["value"] = ", then : What?"
    own = Examples(read(folder, *entries).samples, processor, 512, frames=3)
    (ids, labels, shown), (other_ids, other_labels, others) = map(own.row, own.samples)
    assert (ids, labels) == (other_ids, other_labels)
    images = processor.image_processor
    assert np.array_equal(images.batch([shown]).pixel_values, images.batch([others]).pixel_values)
    (folder / "v.mp4").write_bytes(b"no film")
    assert own.batch([0]) is None
    assert own.problems == {"video is broken": 1}


@pytest.mark.parametrize("name", [*TEMPLATES, None])
def test_the_system_text_is_the_templates(name, folder):
    _, processor = load(LLAVA, template=name)
    protect = processor.tokenizer.protect
    plain, pirate = read(folder, sample(), sample(system=PIRATE), protect=protect).samples
    own = Examples([plain, pirate], processor, 10_000)
    own.max_length = 10_000  # more than the model's context: vicuna_v0 has long examples
    (ids, labels, _), (other_ids, other_labels, _) = map(own.row, own.samples)
    if name == "plain":  # nothing but the caption is learned
        assert (ids, labels) == (other_ids, other_labels)
        return
    told = [Message("system", protect(PIRATE)), *plain.messages]
    expected = processor.learnable(told, [Image.open(PICTURE)]).ids
    assert other_ids == expected[: len(other_ids)]
    assert other_ids != ids
    assert PIRATE in processor.tokenizer.decode(other_ids)
    answers = [[i for i in row if i != IGNORED] for row in (labels, other_labels)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", [*TEMPLATES, None])
def test_an_answer_of_the_weight_0_is_read_and_not_learned(name, folder):
    _, processor = load(LLAVA, template=name)
    asked, told = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "blue"}
    first = {"role": "user", "content": "<image>\nWhat?"}
    rows = []
    for weights in ((0, None), (1, 1), (None, None)):
        answers = [{**told, "weight": weight} for weight in weights]
        entry = {"image": "a.png", "messages": [first, answers[0], asked, answers[1]]}
        own = Examples(read(folder, entry).samples, processor, 10_000)
        own.max_length = 10_000  # more than the model's context: vicuna_v0 has long examples
        rows.append(own.row(own.samples[0])[:2])
    (ids, labels), (all_ids, all_labels), unweighted = rows
    assert (all_ids, all_labels) == unweighted
    assert ids == all_ids
    known, both = ([i for i in row if i != IGNORED] for row in (labels, all_labels))
    assert 0 < len(known) < len(both)
    assert known == both[-len(known) :]
    assert labels[-len(known) :] == known


LEFT_OUT = {
    "not an object": 7,
    "no list of conversations or messages: id, caption": {"id": 1, "caption": "x"},
    "a turn is not an object": {"conversations": ["Q", "A"]},
    "a turn has an unknown role: 'tool'": sample(*TURNS, {"from": "tool", "value": "x"}),
    "a turn has an unknown role: None": sample({"value": "x"}),
    "a turn has no text: 3": sample({"from": "human", "value": 3}),
    "turns do not alternate: user, user": sample(QUESTION, QUESTION),
    "turns do not alternate: user, assistant, system": sample(
        *TURNS, {"from": "system", "value": ""}
    ),
    "turns do not alternate": sample(ANSWER),
    "image is missing: {}/gone.png": sample(image="gone.png"),
    "image is missing: {}/a\0": sample(image="a\0"),
    "marks and images differ in number: 1 marks, 0 images": sample(image=None),
    "marks and images differ in number: 1 marks, 2 images": sample(image=["a.png", "b.png"]),
    "an image is a URL, expected a file: 'https://example.com/a.png'": sample(
        image="https://example.com/a.png"
    ),
    "image and images differ": sample(images=["b.png"]),
    "an image is no file's name: 391895": sample(image=391895),
    "audio is not supported": sample(image=None, audio="v.wav"),
    "audio_url is not supported": sample({"role": "user", "content": [{"type": "audio_url"}]}),
    "video is missing: {}/v.mp4": sample(image=None, video="v.mp4"),
    "marks and videos differ in number: 0 marks, 1 videos": sample(videos=["v.mp4"]),
    "marks and videos differ in number: 1 marks, 0 videos": sample(
        {"role": "user", "content": [{"type": "video_url"}]}, ANSWER, image=None
    ),
    "video and videos differ": sample(image=None, video="v.mp4", videos=["w.mp4"]),
    "a video is a URL, expected a file: 'https://example.com/v.mp4'": sample(
        image=None, video="https://example.com/v.mp4"
    ),
    "a video is no file's name: 7": sample(image=None, video=7),
    "a part is neither text nor image: {'type': 'text'}": sample(
        {"role": "user", "content": [{"type": "text"}]}
    ),
    "the weight of an answer is neither 0 nor 1: 0.5": sample(QUESTION, {**ANSWER, "weight": 0.5}),
    "every answer has the weight 0": sample(QUESTION, {**ANSWER, "weight": 0}),
    "more than one system text": sample({"from": "system", "value": "x"}, *TURNS, system="y"),
    "the system text is no text: 3": sample(system=3),
    "a picture in a turn that is not the user's": sample(
        QUESTION, {"role": "assistant", "content": [{"type": "image"}]}
    ),
}


@pytest.mark.parametrize("why", LEFT_OUT)
def test_what_cannot_be_used_is_left_out_with_its_place_and_why(why, folder):
    entry = LEFT_OUT[why]
    why = why.replace("{}", str(folder)) if "missing" in why else why
    reading = read(folder, sample(), entry, sample())
    assert len(reading.samples) == 2
    ((place, error),) = reading.left_out
    assert (str(place), str(error)) == (f"{folder / 'train.json'}, index 1", why)
    with pytest.raises(ValueError, match="has no sample that can be used: .*; first, .* line 1: "):
        read(folder, entry, lines=True)


def test_keys_that_say_something_and_are_not_read_are_counted(folder):
    turns = ({**QUESTION, "reasoning": "hm", "weight": 1}, ANSWER)
    reading = read(folder, sample(*turns, caption="x", note=""), sample(caption="y", boxes=[1]))
    assert reading.unread == {"caption": 2, "boxes": 1, "conversations.reasoning": 1}


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.sampled_from(["a.png", "user", "<image>", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "url", "role", "value"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)
TURN = st.dictionaries(st.sampled_from(["from", "value", "role", "content"]), VALUES)
ENTRIES = VALUES | st.dictionaries(
    st.sampled_from(["image", "images", "system", "video", "messages"]), VALUES
).flatmap(
    lambda keys: st.lists(TURN | VALUES | st.sampled_from(TURNS), max_size=4).map(
        lambda turns: {**keys, "conversations": turns}
    )
)


@given(entry=ENTRIES)
@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_json_is_a_sample_or_left_out(entry, folder):
    reading = read(folder, sample(), entry)
    assert len(reading.samples) + len(reading.left_out) == 2


def test_a_template_that_drops_the_system_text_is_no_broken_picture(folder, loaded):
    _, processor = loaded
    source = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    deaf = Processor(
        processor.config,
        processor.tokenizer,
        processor.image_processor,
        template=JinjaTemplate(source, {"eos_token": "</s>"}),
        eos_ids=processor.eos_ids,
    )
    reading = read(folder, sample(system=PIRATE), sample(image="b.png"), sample())
    (folder / "b.png").write_bytes(b"no picture")
    own = Examples(reading.samples, deaf, 512)
    assert own.batch([0, 1, 2]).input_ids.shape[0] == 1
    assert own.problems == {"the template cannot write it": 1, "image is broken": 1}
    assert "drops the system's text" in str(own.left_out[0].error)


def test_a_run_learns_from_films(folder, capsys):
    pytest.importorskip("av", reason="videos: pip install '.[video]'")
    from tests.films import film

    (folder / "v.mp4").write_bytes(film(frames=5))
    (folder / "train.jsonl").write_text(json.dumps(ask("<image>\nWhat moves?", video="v.mp4")))
    assert train(folder, "--frames", "2") == 0
    assert "left out" not in capsys.readouterr().err
    assert (folder / "run" / "adapter").exists()


def train(folder: Path, *more: str) -> int:
    return main(
        [
            *("--model", str(LLAVA), "--stage", "projector", "--data", str(folder / "train.jsonl")),
            *("--image-folder", str(folder), "--output", str(folder / "run")),
            *("--steps", "2", "--batch-size", "2", "--save-every", "1", *more),
        ]
    )


def test_a_run_lists_what_it_leaves_out_once(folder, capsys):
    (folder / "b.png").write_bytes(b"no picture")
    long = sample({"from": "human", "value": "What?\u2028" * 9}, ANSWER, image=None, caption="x")
    entries = [sample(), sample(image="b.png"), sample(image="gone.png"), long, 7]
    text = "\n\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    (folder / "train.jsonl").write_text("\ufeff" + text, encoding="utf-8")
    assert train(folder) == 2
    error = capsys.readouterr().err
    assert f"train.jsonl names files that are not in --image-folder {folder} in 1 of 5 sam" in error
    assert not (folder / "run").exists()
    assert train(folder, "--allow-missing") == 0
    error = capsys.readouterr().err
    assert (
        "2 samples were left out, see skipped.jsonl: image is missing (1), not an object (1)"
        in error
    )
    assert "keys that are not read, with the number of samples: caption (1)" in error
    assert "1 samples were left out, see skipped.jsonl: image is broken (1)" in error
    listed = (folder / "run" / "skipped.jsonl").read_text()
    records = [json.loads(line) for line in listed.splitlines()]
    assert [record["line"] for record in records] == [5, 9, 3]
    assert records[0]["file"] == str(folder / "train.jsonl")
    assert records[0]["why"] == f"image is missing: {folder / 'gone.png'}"
    assert records[2]["why"].startswith("image is broken: ")
    assert train(folder, "--allow-missing", "--steps", "2", "--resume") == 0
    assert (folder / "run" / "skipped.jsonl").read_text() == listed


def test_a_run_that_learns_nothing_is_an_error(folder, capsys):
    (folder / "a.png").write_bytes(b"no picture")
    (folder / "train.jsonl").write_text(json.dumps(sample()))
    assert train(folder) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: Nothing was learned in 2 steps: image is broken (1)."
    assert not (folder / "run" / "adapter").exists()


REPORTED = {
    "system_key": True,
    "system_prompt_key": True,
    "system_turn": True,
    "images_key_no_mark": False,
    "user_assistant": False,
}


@pytest.mark.parametrize("name", REPORTED)
def test_samples_of_reports_are_learned(name, folder):
    path = shared_data(f"reports/train_silent_keys/{name}.json")
    (only,), left_out, unread = read_samples(path, folder, str)
    assert only.messages == (LEARNED_PIRATE if REPORTED[name] else MESSAGES)
    assert not left_out
    assert not unread


@pytest.mark.parametrize(
    "name", ["json_bom/train.json", "jsonl_unicode_line_ends/train_u2028.jsonl"]
)
def test_files_of_reports_are_read(name, folder):
    (only,) = read_samples(shared_data(f"reports/{name}"), folder, str).samples
    assert only.messages[1].text == ("red\u2028star" if "u2028" in name else "red")


def test_a_video_of_a_report_is_looked_for(folder):
    path = shared_data("reports/train_silent_keys/video.json")
    with pytest.raises(ValueError, match="no sample that can be used: video is missing"):
        read_samples(path, folder, str)
