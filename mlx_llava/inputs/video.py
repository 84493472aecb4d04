"""A video, however it comes -> some of its frames, as RGB images of 8 bits.

Which ones are the originals' choice (LLaVA-NeXT, `load_video`): evenly many between the first and
the last. How a film was held is applied as for photographs; sound is passed over.
"""

from __future__ import annotations

import io
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from mlx_llava.files import expand_home
from mlx_llava.inputs.image import (
    FORMATS,
    ImageSource,
    find_file,
    has_image_beginning,
    is_data_url,
    load_image,
    naming,
    open_image,
    read_source,
)
from mlx_llava.inputs.image_paths import find_images
from mlx_llava.inputs.rgb import to_rgb

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

#: How many frames are taken of a file, where nothing says it.
FRAMES = 8
#: Where the model was trained on videos (LLaVA-NeXT-Video, OneVision).
KNOWN_FRAMES = 32
#: Containers by FFmpeg's names, and how each begins. FFmpeg knows more, some of which are lists of
#: other files or of addresses, which it would open.
_BEGINNINGS = {
    "mov": rb"....(ftyp|moov|mdat|wide|free|skip|pnot)",
    "matroska": rb"\x1aE\xdf\xa3",
    "avi": rb"RIFF....AVI ",
    "mpegts": rb"G.{187}G",
    "mpeg": rb"\0\0\x01\xba",
    "flv": rb"FLV\x01",
}
CONTAINERS = tuple(_BEGINNINGS)
_HEAD = 512
#: By the angle that a film has to be turned, against the clock.
_TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}
#: How the names of films end, as folders and typed lines are searched for them.
ENDINGS = frozenset(".mp4 .m4v .mov .mkv .webm .avi .ts .mts .mpg .mpeg .flv".split())


@dataclass(frozen=True)
class Limits:
    """What is read at most; nothing is decoded of what is beyond.

    Attributes:
        pixels: of all frames that are taken, together.
        decoded: pixels of all frames that it has.
        seconds: how long it may last.
        size: of its file, in bytes.
        containers: what a file may be, by FFmpeg's names.
        codecs: how a film may be encoded, by the names of FFmpeg's decoders; () for all.
        images: what an animation may be, by Pillow's names.
    """

    pixels: int = 1_000_000_000
    decoded: int = 10**13
    seconds: float = 4 * 3600
    size: int = 100_000_000_000
    containers: Sequence[str] = CONTAINERS
    codecs: Sequence[str] = ()
    images: Sequence[str] = FORMATS


LIMITS = Limits()


@dataclass(frozen=True)
class Video:
    """The frames that were taken of a video; also a `VideoSource`."""

    frames: tuple[Image.Image, ...] = field(repr=False)


Stills: TypeAlias = "Sequence[ImageSource] | npt.NDArray[Any]"
VideoSource: TypeAlias = "str | Path | bytes | BinaryIO | Stills | Video"


def is_ready(source: VideoSource) -> bool:
    """Whether a source is frames, rather than what has to be decoded."""
    return isinstance(source, (Video, list, tuple, np.ndarray))


def is_film(path: str | Path) -> bool:
    """Whether a file is a film by its name."""
    return Path(path).suffix.lower() in ENDINGS


def sample(total: int, frames: int) -> list[int]:
    """Which of so many frames are taken; of few, some more than once, as the originals do."""
    return np.linspace(0, total - 1, frames, dtype=int).tolist()


def load_video(source: VideoSource, frames: int | None = None, limits: Limits = LIMITS) -> Video:
    """Takes some frames of a video.

    Args:
        source: The path of a film, of an animation (GIF, WebP) or of a folder of images, which
            are its frames by their names; an http(s) or data: URL, the bytes of a file, or an
            open binary file; or frames: a list of what `load_image` takes, or an array (N, H, W,
            3).
        frames: How many, evenly from the first to the last. Default: 8 of a file or a folder, and
            all of those that are given as such.
        limits: What is read at most.

    Raises:
        OSError: There is no such file, or it cannot be opened.
        ValueError: It is no video, it is broken, it is too large, or PyAV is not installed.
    """
    if frames is not None and frames < 1:
        raise ValueError(f"frames is {frames}; it must be at least 1.")
    source = source.frames if isinstance(source, Video) else source
    if isinstance(source, (list, tuple, np.ndarray)):
        return _stills(source, "The video", frames or len(source), limits)
    count = frames or FRAMES
    if isinstance(source, (str, Path)) and expand_home(source).is_dir():
        names = sorted(find_images([str(source)]), key=_by_number)
        return _stills(names, str(source), count, limits)
    with _opened(source, limits) as moving:
        moving.check(count, limits)
        return Video(tuple(moving.take(count)))


def video_pixels(source: VideoSource, frames: int, limits: Limits = LIMITS) -> int:
    """How many pixels so many frames of a film or an animation have; nothing is decoded.

    Raises:
        ValueError: As `load_video`.
    """
    with _opened(source, limits) as moving:
        return moving.check(frames, limits)


def _by_number(name: str) -> list[str]:
    """Sorts frame 2 before frame 10."""
    return [part.zfill(20) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


def _stills(images: Stills, name: str, count: int, limits: Limits) -> Video:
    if not len(images):
        raise ValueError(f"{name} has no frames.")
    chosen, taken = sample(len(images), count), dict[int, Image.Image]()
    for i in dict.fromkeys(chosen):
        taken[i] = load_image(images[i], limits.pixels // count, limits.images)
    return Video(tuple(taken[i] for i in chosen))


class _Moving(NamedTuple):
    """A film or an animation that is open."""

    name: str
    size: tuple[int, int]  # (width, height)
    total: int
    some: Callable[[set[int]], tuple[dict[int, Image.Image], int]]  # frames, and how many were seen

    def check(self, count: int, limits: Limits) -> int:
        """How many pixels so many frames have, where they and what is decoded are not too many."""
        width, height = self.size
        if not self.total:
            raise ValueError(f"{self.name} has no frames.")
        for frames, limit in ((count, limits.pixels), (self.total, limits.decoded)):
            if (pixels := width * height * frames) > limit:
                raise ValueError(
                    f"{self.name} has {self.total:,} frames of {width}x{height}, of which {count} "
                    f"are taken; {frames:,} have {pixels:,} pixels, and the limit is {limit:,}."
                )
        return width * height * count

    def take(self, count: int) -> Iterator[Image.Image]:
        """So many frames, evenly from the first to the last that can be seen."""
        with naming(self.name, "video"):
            chosen = sample(self.total, count)
            taken, seen = self.some({*chosen})
            if 0 < seen < self.total:  # a film that is cut off, say
                chosen = sample(seen, count)
                taken, _ = self.some({*chosen})
            return iter([taken[i] for i in chosen])


@contextmanager
def _opened(source: Any, limits: Limits) -> Iterator[_Moving]:
    with _file(source) as (file, name):
        if (size := file.seek(0, io.SEEK_END)) > limits.size:
            raise ValueError(f"{name} has {size:,} bytes; the limit is {limits.size:,}.")
        file.seek(0)
        head = file.read(_HEAD)
        file.seek(0)
        if has_image_beginning(head):
            yield _animation(file.read(), name, limits)
        else:
            with _film(file, _container(head, name, limits), name, limits) as film:
                yield film


@contextmanager
def _file(source: Any) -> Iterator[tuple[BinaryIO, str]]:
    """A file that can be read and searched, and its name in errors."""
    text = str(source)
    is_url = is_data_url(text) or text.startswith(("http://", "https://"))
    if not isinstance(source, (str, Path)) or is_url:
        content, name = read_source(source, "video")
        yield io.BytesIO(content), name
        return
    with find_file(text, "video").open("rb") as file:
        yield (file if file.seekable() else io.BytesIO(file.read())), text


def _container(head: bytes, name: str, limits: Limits) -> str:
    for container in limits.containers:
        if re.match(_BEGINNINGS[container], head, re.DOTALL):
            return container
    what = f"not a video ({', '.join(limits.containers)}, GIF, WebP)" if head else "empty"
    raise ValueError(f"{name} is {what}.")


def _animation(content: bytes, name: str, limits: Limits) -> _Moving:
    image, file, _ = open_image(content, limits.pixels, limits.images)
    with naming(name, "video"):
        total = getattr(image, "n_frames", 1)

    def some(chosen: set[int]) -> tuple[dict[int, Image.Image], int]:
        taken = {}
        for i in sorted(chosen):
            image.seek(i)
            taken[i] = to_rgb(image.copy(), file.levels, name)
        return taken, total

    return _Moving(name, image.size, total, some)


@contextmanager
def _film(file: BinaryIO, container: str, name: str, limits: Limits) -> Iterator[_Moving]:
    try:
        import av
    except ImportError as error:
        raise ValueError(f"{name} is a film: pip install 'mlx_llava[video]' to read it.") from error
    decoders = {"codec_whitelist": ",".join(limits.codecs)} if limits.codecs else {}
    with naming(name, "video"):
        opened = av.open(
            *(file, "r"),
            format=container,
            # Not as `options`: PyAV's are of as many streams as a header names, and some name none.
            container_options={"format_whitelist": container, **decoders},
            metadata_errors="ignore",
            io_open=_refuse,
        )
    with opened:
        if not opened.streams.video:
            raise ValueError(f"{name} has no pictures.")
        stream = opened.streams.video[0]
        if (seconds := (opened.duration or 0) / av.time_base) > limits.seconds:
            raise ValueError(f"{name} lasts {seconds:.0f} s; the limit is {limits.seconds:g} s.")
        with naming(name, "video"):
            packets = [
                (packet.pts, packet.is_keyframe)
                for packet in opened.demux(stream)
                if packet.size and not packet.is_discard
            ]
        coded = stream.codec_context.codec.name
        if limits.codecs and coded not in limits.codecs:
            raise ValueError(f"{name} is encoded as {coded}; use {', '.join(limits.codecs)}.")
        stream.codec_context.options = {"max_pixels": str(limits.pixels), **decoders}
        stream.thread_type = "AUTO"

        def some(chosen: set[int]) -> tuple[dict[int, Image.Image], int]:
            taken = _sought(opened, stream, packets, chosen)
            return (taken, len(packets)) if taken else _decoded(opened, stream, chosen)

        yield _Moving(name, (stream.width, stream.height), len(packets), some)


def _refuse(url: str, *_: Any) -> NoReturn:
    raise ValueError(f"it leads to another file, {url!r:.80}")


def _sought(
    opened: InputContainer,
    stream: VideoStream,
    packets: Sequence[tuple[int | None, bool]],
    chosen: set[int],
) -> dict[int, Image.Image] | None:
    """Some frames by their number, each decoded from the last key frame but one before it.

    From the last one alone, a film that is refreshed piece by piece would not be whole yet.

    Returns:
        None where times do not tell which frames they are: see `_decoded`.
    """
    times = sorted(time for time, _ in packets if time is not None)
    keys = sorted(time for time, is_key in packets if is_key and time is not None)
    if len(times) < len(packets) or len({*times}) < len(times):
        return None
    taken, reached = dict[int, Image.Image](), -1
    frames: Iterator[VideoFrame] = iter(())
    for i in sorted(chosen):
        if not (before := bisect_right(keys, times[i])):
            return None
        key = keys[max(before - 2, 0)]
        if not taken or key > reached:
            opened.seek(key, stream=stream)
            frames = opened.decode(stream)
        later = (frame for frame in frames if frame.pts is None or frame.pts >= times[i])
        frame = next(later, None)
        if frame is None or frame.pts != times[i]:
            return None
        reached, taken[i] = times[i], _rgb(frame, stream)
    return taken


def _decoded(
    opened: InputContainer, stream: VideoStream, chosen: set[int]
) -> tuple[dict[int, Image.Image], int]:
    """Some frames by their number, counted from the first, and how many were seen for it."""
    taken, seen, last = dict[int, Image.Image](), 0, max(chosen)
    opened.seek(0)
    for seen, frame in enumerate(opened.decode(stream), 1):
        if seen - 1 in chosen:
            taken[seen - 1] = _rgb(frame, stream)
        if seen > last:
            break
    return taken, seen


def _rgb(frame: VideoFrame, stream: VideoStream) -> Image.Image:
    if (frame.width, frame.height) != (stream.width, stream.height):
        raise ValueError(f"one of its frames is {frame.width}x{frame.height}, others are not")
    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    turn = _TURNS.get(frame.rotation % 360)
    return image if turn is None else image.transpose(turn)
