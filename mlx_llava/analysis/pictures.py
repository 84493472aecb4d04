"""What a prompt shows, each as one picture: an image, or the frames of a video side by side.

F features of a picture, R parts that are masked. A box is (left, top, right, bottom).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from mlx_llava.analysis.boxes import Array, feature_boxes, frame_boxes, patch_boxes
from mlx_llava.inputs.image_processor import ImageProcessor, Pixels
from mlx_llava.inputs.inputs import Inputs
from mlx_llava.inputs.processor import Processor
from mlx_llava.inputs.video import Video

#: Into how many parts, in each direction, a picture is cut to be masked.
MOST_PARTS = 6
#: The longer side of a sheet of frames, in pixels.
SHEET = 2048


@dataclass(frozen=True)
class Picture:
    """An image or a video of a prompt.

    Attributes:
        image: as it was read; of a video a sheet of its frames, row by row.
        frames: what it is made of; an image is its own only frame.
        corners: where each lies in it, (left, top).
        scale: by how much it is smaller than they are.
        reader: what cuts them.
        entries: which it is of all images in the prompt.
        boxes: which part of it its features show, (F, 4); see `boxes.feature_boxes`.
    """

    image: Image.Image
    frames: tuple[Image.Image, ...]
    corners: tuple[tuple[float, float], ...]
    scale: float
    reader: ImageProcessor
    entries: range
    boxes: Array

    def parts(self, window: int | None = None) -> list[tuple[int, Array]]:
        """Windows of so many patches in each direction: of which frame, and where in that.

        Raises:
            ValueError: `window` is below 1.
        """
        most = max(1, int(MOST_PARTS / math.sqrt(len(self.frames))))
        found = []
        for number, frame in enumerate(self.frames):
            patches = patch_boxes(self.reader, (frame.height, frame.width))[0]
            side = -(-len(patches) // most) if window is None else window
            if side < 1:
                raise ValueError(f"window is {side}; it must be at least 1.")
            starts = range(0, len(patches), side)
            blocks = [patches[i : i + side, j : j + side] for i in starts for j in starts]
            found += [(number, np.array([*b[0, 0, :2], *b[-1, -1, 2:]])) for b in blocks]
        return found

    def place(self, frame: int, box: Array) -> Array:
        """Where a part of a frame is in the picture."""
        return box * self.scale + self.corners[frame] * 2

    def masked(self, parts: Sequence[tuple[int, Array]]) -> Iterator[Pixels]:
        """Its tiles with one part after the other in its median colour."""
        median = tuple(map(int, np.median(np.asarray(self.image), axis=(0, 1))))
        for number, box in parts:
            frames = [*self.frames]
            frames[number] = _filled(frames[number], box, median)
            yield self.reader(frames)


def _filled(image: Image.Image, box: Array, colour: tuple[int, ...]) -> Image.Image:
    """A copy with one part in a colour; a pixel that the box cuts belongs to it."""
    left, top, right, bottom = box
    copy = image.copy()
    corners = (np.floor(left), np.floor(top), np.ceil(right) - 1, np.ceil(bottom) - 1)
    ImageDraw.Draw(copy).rectangle(tuple(map(int, corners)), fill=colour)
    return copy


def pictures_of(
    inputs: Inputs, images: Sequence[Image.Image], videos: Sequence[Video], processor: Processor
) -> list[Picture]:
    """All that one prompt shows, in reading order."""
    reader, count = processor.image_processor, len(inputs.image_tokens)
    taken = {video.images.start: video.images for video in inputs.videos}
    single = reader.among(count - (len(taken) if reader.frames else 0))
    remaining, films, start = iter(images), iter(videos), 0
    found = []
    while start < count:
        if entries := taken.get(start):
            found.append(_of_video(next(films).frames, entries, reader.frames, single))
        else:
            entries = range(start, start + 1)
            image = next(remaining)
            boxes = feature_boxes(single, (image.height, image.width))
            found.append(Picture(image, (image,), ((0, 0),), 1, single, entries, boxes))
        start = entries.stop
    return found


def _of_video(
    frames: tuple[Image.Image, ...],
    entries: range,
    pooling: ImageProcessor | None,
    single: ImageProcessor,
) -> Picture:
    """A video, which one reader takes as a whole, or another as images."""
    sizes = [(frame.height, frame.width) for frame in frames]
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    columns = math.ceil(math.sqrt(len(frames) * height / width))
    rows = -(-len(frames) // columns)
    scale = min(1.0, SHEET / max(rows * height, columns * width))
    cell = math.ceil(height * scale), math.ceil(width * scale)
    sheet = Image.new("RGB", (columns * cell[1], rows * cell[0]))
    corners = [(i % columns * cell[1], i // columns * cell[0]) for i in range(len(frames))]
    for frame, corner in zip(frames, corners, strict=True):
        size = (max(1, round(side * scale)) for side in frame.size)
        sheet.paste(frame.resize(tuple(size), Image.Resampling.BOX), corner)
    boxes = frame_boxes(pooling or single, sizes, np.array(corners) / scale)
    reader = pooling or single
    return Picture(sheet, frames, tuple(corners), scale, reader, entries, boxes * scale)
