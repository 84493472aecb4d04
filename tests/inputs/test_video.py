"""Frames of videos are those that the originals take, to the index and to the bit."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

av = pytest.importorskip("av", reason="videos: pip install '.[video]'")

from mlx_llava.inputs.video import Limits, Video, load_video, sample, video_pixels  # noqa: E402
from tests.films import SIZE, decoded, drawn, film  # noqa: E402


def arrays(video: Video) -> list[np.ndarray]:
    return [np.asarray(frame) for frame in video.frames]


def same(ours, theirs) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def originals(frames: list, count: int) -> list:
    """LLaVA-NeXT's choice (llava/eval and playground, load_video)."""
    return [frames[i] for i in np.linspace(0, len(frames) - 1, count, dtype=int)]


@pytest.mark.parametrize(
    ("codec", "container"),
    [
        ("libx264", "mp4"),
        ("libvpx-vp9", "webm"),
        ("libx264", "matroska"),
        ("mpeg4", "avi"),
        ("libx264", "mpegts"),
        ("mpeg2video", "mpeg"),
        ("flv", "flv"),
    ],
)
def test_frames_are_the_originals(codec, container):
    content = film(codec, container)
    frames = decoded(content)
    assert len(frames) == 23
    for count in (1, 3, 9, 32):  # of few frames, some more than once
        assert same(arrays(load_video(content, count)), originals(frames, count))


@pytest.mark.parametrize(
    "how",
    [
        "open-gop=1:bframes=3:keyint=12:min-keyint=12:scenecut=0",
        "intra-refresh=1:keyint=12:bframes=0",
        "bframes=5:keyint=250",
    ],
    ids=lambda how: how.partition("=")[0],
)
def test_frames_that_are_sought_are_those_that_are_counted(how, monkeypatch):
    content = film(frames=60, size=(256, 192), **{"x264-params": how})
    frames = decoded(content)
    monkeypatch.setattr("mlx_llava.inputs.video._decoded", lambda *_: pytest.fail("it counts"))
    for count in (2, 5, 13, 60):
        assert same(arrays(load_video(content, count)), originals(frames, count))


def test_a_film_comes_from_wherever_it_is(tmp_path: Path, monkeypatch):
    content = film(frames=9)
    expected = originals(decoded(content), 8)
    path = tmp_path / "film.mp4"
    path.write_bytes(content)
    with path.open("rb") as file:
        for source in (content, path, str(path), io.BytesIO(content), file):
            assert same(arrays(load_video(source)), expected)
    monkeypatch.chdir(tmp_path)
    assert same(arrays(load_video("film.mp4")), expected)


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_animations_are_videos(format):
    frames = [Image.fromarray(drawn(i)) for i in range(7)]
    file = io.BytesIO()
    options = {"lossless": True} if format == "WEBP" else {}
    frames[0].save(file, format, save_all=True, append_images=frames[1:], **options)
    animation, theirs = Image.open(file), []
    for i in range(7):
        animation.seek(i)
        theirs.append(np.asarray(animation.convert("RGB")))
    assert same(arrays(load_video(file.getvalue(), 4)), originals(theirs, 4))


def test_a_folder_of_frames_is_read_by_number(tmp_path: Path):
    for i in range(12):
        Image.fromarray(drawn(i)).save(tmp_path / f"frame_{i}.png")
    expected = originals([drawn(i) for i in range(12)], 5)
    assert same(arrays(load_video(tmp_path, 5)), expected)


def test_frames_that_are_given_are_taken_all_unless_fewer_are_wanted():
    given = [drawn(i) for i in range(5)]
    for source in (given, np.stack(given), [*map(Image.fromarray, given)], load_video(given)):
        assert same(arrays(load_video(source)), given)
        assert same(arrays(load_video(source, 3)), originals(given, 3))


def test_a_film_is_turned_as_it_was_held(tmp_path: Path, monkeypatch):
    plain = film(frames=3)
    # The matrix of the track's header (ISO/IEC 14496-12, 8.3.2), with a quarter turn.
    upright = b"\0\1\0\0" + b"\0" * 12 + b"\0\1\0\0" + b"\0" * 12 + b"\x40\0\0\0"
    quarter = b"\0" * 4 + b"\0\1\0\0" + b"\0" * 4 + b"\xff\xff\0\0" + b"\0" * 16 + b"\x40\0\0\0"
    start = plain.index(upright, plain.index(b"tkhd"))
    held = plain[:start] + quarter + plain[start + len(upright) :]
    turned = [np.rot90(frame, -1) for frame in decoded(plain)]
    assert same(arrays(load_video(held, 3)), turned)


def test_a_recording_that_begins_in_the_middle_is_counted_by_what_can_be_seen():
    begun = film("libx264", "mpegts")[188 * 10 :]
    seen = decoded(begun)
    with av.open(io.BytesIO(begun)) as container:
        packets = sum(bool(packet.size) for packet in container.demux(video=0))
    assert packets > len(seen)
    assert same(arrays(load_video(begun, 5)), originals(seen, 5))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello" * 9, "is not a video"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "is not a video"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "is not a video"),
        (b"\0\0\0\x18ftypisom" + b"\0" * 99, "is a broken video"),
        (b"\x1aE\xdf\xa3" + b"\xff" * 99, "is a broken video"),
    ],
)
def test_what_is_no_film_is_said_so(content, message):
    with pytest.raises(ValueError, match=message):
        load_video(content)


def test_sound_alone_is_no_video():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.rate = 8000
        output.mux(stream.encode(sound))
        output.mux(stream.encode())
    with pytest.raises(ValueError, match="has no pictures"):
        load_video(file.getvalue())


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(pixels=8 * 64 * 48 - 1), "8 are taken; 8 have 24,576 pixels"),
        (Limits(decoded=23 * 64 * 48 - 1), "23 have 70,656 pixels"),
        (Limits(seconds=2), "lasts 2 s; the limit is 2 s"),
        (Limits(size=1000), "bytes; the limit is 1,000"),
        (Limits(containers=("matroska",)), r"is not a video \(matroska"),
    ],
)
def test_bounds_are_kept_before_anything_is_decoded(limits, message, monkeypatch):
    content = film()
    monkeypatch.setattr("mlx_llava.inputs.video._decoded", lambda *_: pytest.fail("it decodes"))
    for reader in (load_video, video_pixels):
        with pytest.raises(ValueError, match=message):
            reader(content, 8, limits)


@pytest.mark.parametrize(
    ("codec", "container", "decoder"), [("libx264", "mp4", "h264"), ("libvpx-vp9", "webm", "vp9")]
)
def test_only_named_decoders_are_used(codec, container, decoder):
    content = film(codec, container, frames=3)
    assert len(load_video(content, 2, Limits(codecs=(decoder, "hevc"))).frames) == 2
    with pytest.raises(ValueError, match="is encoded as .*; use hevc"):
        load_video(content, 2, Limits(codecs=("hevc",)))


def test_pixels_are_counted_without_decoding(monkeypatch):
    monkeypatch.setattr("mlx_llava.inputs.video._decoded", lambda *_: pytest.fail("it decodes"))
    assert video_pixels(film(frames=3), 5) == 5 * SIZE[0] * SIZE[1]


def test_an_animation_and_a_list_have_the_same_bounds(tmp_path: Path):
    frames = [Image.fromarray(drawn(i)) for i in range(4)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    for source in (tmp_path / "a.gif", frames):
        with pytest.raises(ValueError, match="pixels"):
            load_video(source, 4, Limits(pixels=4 * SIZE[0] * SIZE[1] - 1))
    with pytest.raises(ValueError, match="4 have"):
        load_video(tmp_path / "a.gif", 2, Limits(decoded=4 * SIZE[0] * SIZE[1] - 1))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("missing.mp4", FileNotFoundError, "There is no video missing.mp4"),
        ([], ValueError, "has no frames"),
        (3, ValueError, "must be a path"),
    ],
)
def test_what_is_not_there_is_said_so(source, error, message):
    with pytest.raises(error, match=message):
        load_video(source)


def test_an_odd_number_of_frames_is_refused():
    with pytest.raises(ValueError, match="frames is 0"):
        load_video(b"", 0)


def test_a_film_without_pyav_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"pip install 'mlx_llava\[video\]'"):
        load_video(film(frames=1))


def test_samples_are_even_with_both_ends():
    assert sample(100, 4) == [0, 33, 66, 99]
    assert sample(3, 5) == [0, 0, 1, 1, 2]
    assert sample(9, 1) == [0]
