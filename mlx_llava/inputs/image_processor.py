"""RGB images -> the float32 tiles that the vision tower reads.

S is the side of one tile, N tiles. Sizes are (height, width) except where Pillow is spoken
to. Every step is bit-equal to transformers' Pillow image processors (CLIPImageProcessor,
LlavaImageProcessor, LlavaNextImageProcessor, SiglipImageProcessor):
tests/inputs/test_image_processor.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from mlx_llava.inputs.image import MAX_PIXELS, check_pixels
from mlx_llava.inputs.video import Video
from mlx_llava.model.anyres import (
    MODES,
    Frames,
    ImageSizes,
    Layout,
    Size,
    canvas_size,
    num_tokens,
)
from mlx_llava.model.config import LlavaConfig
from mlx_llava.model.config_values import read_pinpoints

Pixels: TypeAlias = npt.NDArray[np.float32]

#: OpenAI CLIP's normalisation (clip.py, _transform), for checkpoints without a processor file.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
#: SigLIP's, both.
HALF = (0.5, 0.5, 0.5)

#: In pixels, of what is made in one piece.
LARGEST_SQUARE = 1 << 24

#: (left, top, right, bottom).
Box: TypeAlias = tuple[float, float, float, float]


class View(NamedTuple):
    """A way to resize an image, and the squares of it that become tiles."""

    frame: Size  # the image's, with what is padded around it before it is resized
    size: Size  # what the frame is resized to
    corners: Sequence[tuple[int, int]]  # of squares in that, (top, left); beyond it all is black


class Cut(NamedTuple):
    """How one image or video of a prompt is cut."""

    reader: ImageProcessor
    images: Sequence[Image.Image]  # itself, or its frames
    layout: Layout

    @property
    def tokens(self) -> int:
        """How many positions it takes in the prompt."""
        return num_tokens(self.layout, self.reader.config)


class Tiles(NamedTuple):
    """The tiles of several images in order, as `Inputs` has them."""

    pixel_values: Pixels | None
    image_sizes: ImageSizes
    whole_image_tokens: tuple[int, ...]
    image_tiles: tuple[int, ...]


def _shortest_edge(size: Size, side: int) -> Size:
    """The size with a shorter edge of `side`; the longer one is truncated, not rounded."""
    longer = int(side * max(size) / min(size))
    return (longer, side) if size[1] <= size[0] else (side, longer)


def _center(size: Size, window: Size) -> tuple[int, int]:
    """Where a window in the middle begins, (top, left)."""
    # Floor division as in transformers.image_transforms.center_crop, also where negative.
    return (size[0] - window[0]) // 2, (size[1] - window[1]) // 2


def _resize_square(
    image: Image.Image, size: Size, background: tuple[int, ...], resample: Image.Resampling
) -> Image.Image:
    """Centres the image on a square of its longer side (LLaVA's expand2square), and resizes it.

    The square of a panorama is far larger than the image and is never made: Pillow resizes
    each row by itself, to 8 bits, and then the columns, so that strips give the same bits. (Where
    `size` is no square, it may take columns first, and some bits differ by one.)
    """
    height, width = size
    side = max(image.size)
    check_pixels((width, side), MAX_PIXELS, "The padded image")
    top, left = _center((side, side), (image.height, image.width))
    if side * side <= LARGEST_SQUARE:
        square = Image.new("RGB", (side, side), background)
        square.paste(image, (left, top))
        return square.resize((width, height), resample)
    narrow = Image.new("RGB", (width, side), background)
    rows = max(1, LARGEST_SQUARE // side)
    for start in range(0, image.height, rows):
        end = min(start + rows, image.height)
        strip = Image.new("RGB", (side, end - start), background)
        strip.paste(image.crop((0, start, image.width, end)), (left, 0))
        narrow.paste(strip.resize((width, end - start), resample), (0, top + start))
    return narrow.resize((width, height), resample)


def _fitted(size: Size, canvas: Size) -> Size:
    """The largest size of the same proportions that fits a canvas."""
    (height, width), (rows, columns) = size, canvas
    by_width, by_height = columns / width, rows / height
    if by_width < by_height:
        return min(math.ceil(height * by_width), rows), columns
    return rows, min(math.ceil(width * by_height), columns)


def _read_size(size: int | Mapping[str, int], key: str) -> int | Size:
    if isinstance(size, int):
        return size
    size = {name: pixels for name, pixels in size.items() if pixels is not None}
    if set(size) == {"shortest_edge"}:
        return size["shortest_edge"]
    if set(size) == {"height", "width"}:
        return size["height"], size["width"]
    raise ValueError(f"The image processor's {key}={size!r} is not supported.")


def _stretching(data: Mapping[str, Any], side: int) -> dict[str, Any]:
    """What SiglipImageProcessor's settings say in CLIP's words: it has no crop."""
    size = data.get("size", {"height": side, "width": side})
    stretched = {"size": size, "crop_size": size, "do_center_crop": True}
    return {"image_mean": HALF, "image_std": HALF, **data, **stretched}


@dataclass(frozen=True)
class ImageProcessor:
    """Images -> tiles of normalised pixels, as one checkpoint reads them.

    Attributes:
        config: the model that reads the pixels; its vision tower sets the side S of a tile.
        mode: ``crop`` (shortest edge, centre crop; SigLIP's is squashed instead), ``pad`` (LLaVA
            1.5's square on the mean colour) or ``anyres`` (LLaVA 1.6's base image and tiles).
        size: what images are resized to: the shorter edge, or (height, width).
        frames: what reads the frames of videos, in models that know videos.
    """

    config: LlavaConfig
    mode: str
    size: int | Size
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    rescale_factor: float = 1 / 255
    resample: Image.Resampling = Image.Resampling.BICUBIC
    frames: ImageProcessor | None = None

    def with_frames(self, data: Mapping[str, Any] | None) -> ImageProcessor:
        """The same, which reads frames as video_preprocessor_config.json says, or like images."""
        if self.config.pooling is None:
            return self
        frames = replace(self, mode="crop")
        return replace(self, frames=self.from_config(data, self.config, "crop") if data else frames)

    @classmethod
    def from_config(
        cls, data: Mapping[str, Any] | None, config: LlavaConfig, mode: str | None = None
    ) -> ImageProcessor:
        """Reads preprocessor_config.json; `mode` overrides its way.

        What it does not say is CLIP's, or SigLIP's where it is of SigLIP's class or names none.

        Raises:
            ValueError: A setting is not supported or does not fit the model.
        """
        data = {key: value for key, value in (data or {}).items() if value is not None}
        vision = config.vision_config
        kind = data.get("image_processor_type", "Siglip" if vision.is_siglip else "CLIP")
        if "Siglip" in kind:
            data = _stretching(data, vision.image_size)
        for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"):
            if data.get(key, True) is False:
                raise ValueError(f"The image processor has {key}=false, which is not supported.")
        if mode is None:
            pads = data.get("do_pad") and "LlavaImage" in data.get("image_processor_type", "")
            mode = "anyres" if config.is_anyres else "pad" if pads else "crop"
        side = config.vision_config.image_size
        processor = cls(
            config=config,
            mode=mode,
            size=_read_size(data.get("size", side), "size"),
            mean=tuple(data.get("image_mean", CLIP_MEAN)),
            std=tuple(data.get("image_std", CLIP_STD)),
            rescale_factor=data.get("rescale_factor", 1 / 255),
            resample=Image.Resampling(data.get("resample", Image.Resampling.BICUBIC)),
        )
        processor._check(data)
        return processor

    def _check(self, data: Mapping[str, Any]) -> None:
        side = self.config.vision_config.image_size
        if self.mode not in MODES:
            raise ValueError(f"There is no image mode {self.mode!r}; known: {', '.join(MODES)}.")
        crop = _read_size(data.get("crop_size", side), "crop_size")
        if crop not in (side, (side, side)):
            raise ValueError(
                f"The image processor makes tiles of {crop} pixels, the vision tower reads {side}."
            )
        if self.mode != "anyres":
            return
        if not self.config.is_anyres:
            raise ValueError(
                "Image mode anyres needs a model of LLaVA 1.6 or OneVision (llava_next, "
                "llava_next_video or llava_onevision)."
            )
        pinpoints = self.config.image_grid_pinpoints
        if read_pinpoints(data.get("image_grid_pinpoints") or pinpoints, side) != pinpoints:
            raise ValueError("image_grid_pinpoints of the image processor and config.json differ.")
        if self.size not in (side, (side, side)):
            raise ValueError(
                f"anyres tiles are {side} pixels but the processor's size={self.size}."
            )
        if any(pixels % side for pinpoint in pinpoints for pixels in pinpoint):
            raise ValueError(f"image_grid_pinpoints must be multiples of the tile side, {side}.")

    def to_dict(self) -> dict[str, Any]:
        """The preprocessor_config.json that says the same."""
        side, size = self.config.vision_config.image_size, self.size
        stretches = self.config.vision_config.is_siglip and size == (side, side)
        crop, cut = "Siglip" if stretches else "CLIP", self.config.class_name.removesuffix("Video")
        names = {"crop": crop, "pad": "Llava", "anyres": cut}
        data: dict[str, Any] = {
            "image_processor_type": f"{names[self.mode]}ImageProcessor",
            "size": {"shortest_edge": size}
            if isinstance(size, int)
            else {"height": size[0], "width": size[1]},
            "crop_size": {"height": side, "width": side},
            "resample": int(self.resample),
            "rescale_factor": self.rescale_factor,
            "image_mean": self.mean,
            "image_std": self.std,
            "do_pad": self.mode != "crop",
        }
        if self.mode == "anyres":
            data["image_grid_pinpoints"] = self.config.image_grid_pinpoints
        return data

    def __call__(self, images: Sequence[Image.Image]) -> Pixels:
        """Cuts RGB images and normalises them: the tiles of all in order, (N, S, S, 3)."""
        return self._stack([tile for image in images for tile in self.tiles(image)])

    def _stack(self, tiles: Sequence[Image.Image]) -> Pixels:
        return self.normalize(np.stack([np.asarray(tile) for tile in tiles]))

    def among(self, count: int) -> ImageProcessor:
        """What reads each of so many images of one prompt: OneVision pads several, and cuts one."""
        pads = count > 1 and self.mode == "anyres" and self.config.pads_several
        return replace(self, mode="pad") if pads else self

    def read(self, row: Sequence[Image.Image | Video]) -> Iterator[Cut]:
        """How the images and videos of one prompt are cut."""
        reader = self.among(sum(not isinstance(one, Video) for one in row))
        for one in row:
            if not isinstance(one, Video):
                size = (one.height, one.width) if reader.mode == "anyres" else None
                yield Cut(reader, [one], size)
            elif self.frames:
                yield Cut(self.frames, one.frames, Frames(len(one.frames)))

    def batch(self, rows: Iterable[Sequence[Image.Image | Video]]) -> Tiles:
        """Cuts the RGB images and videos of several prompts and normalises them."""
        read = [one for row in rows for one in self.read(row)]
        pixels = [one.reader(one.images) for one in read]
        sizes = tuple(one.layout for one in read)
        return Tiles(
            pixel_values=np.concatenate(pixels) if pixels else None,
            image_sizes=sizes if any(sizes) else None,
            whole_image_tokens=tuple(one.tokens for one in read),
            image_tiles=tuple(map(len, pixels)),
        )

    def tiles(self, image: Image.Image) -> list[Image.Image]:
        """One S x S tile, or for anyres the squashed whole image and then its tiles."""
        side, tiles = self.config.vision_config.image_size, []
        for view in self._views((image.height, image.width)):
            resized = self._resize(image, view.size)
            tiles += [resized.crop((x, y, x + side, y + side)) for y, x in view.corners]
        return tiles

    def tile_boxes(self, size: Size) -> list[Box]:
        """Which part of an image of (height, width) each of its `tiles` shows.

        Returns:
            In the image's own pixels; what lies beyond its edges is padding.
        """
        side, boxes = self.config.vision_config.image_size, list[Box]()
        for frame, resized, corners in self._views(size):
            above, beside = _center(frame, size)
            down, across = frame[0] / resized[0], frame[1] / resized[1]
            for y, x in corners:
                left, top = x * across - beside, y * down - above
                boxes.append((left, top, left + side * across, top + side * down))
        return boxes

    def _views(self, size: Size) -> list[View]:
        side = self.config.vision_config.image_size
        if self.mode == "anyres":
            rows, columns = canvas = canvas_size(size, self.config)
            fitted = _fitted(size, canvas)
            above, beside = _center(canvas, fitted)
            grid = product(range(0, rows, side), range(0, columns, side))
            corners = [(y - above, x - beside) for y, x in grid]
            return [View(size, (side, side), [(0, 0)]), View(size, fitted, corners)]
        frame = (max(size),) * 2 if self.mode == "pad" else size
        resized = _shortest_edge(frame, self.size) if isinstance(self.size, int) else self.size
        return [View(frame, resized, [_center(resized, (side, side))])]

    def _resize(self, image: Image.Image, size: Size) -> Image.Image:
        if self.mode == "pad":
            # int() as in LLaVA's mm_utils.py: (122, 116, 104) for CLIP's mean, not rounded.
            background = tuple(int(mean * 255) for mean in self.mean)
            return _resize_square(image, size, background, self.resample)
        check_pixels(size[::-1], MAX_PIXELS, "The resized image")
        return image.resize(size[::-1], self.resample)

    def normalize(self, pixels: npt.NDArray[np.uint8]) -> Pixels:
        """Maps uint8 (..., 3) to normalised float32, through a table of the 256 levels.

        The table is computed in transformers' own order: levels scaled in float64, cast to
        float32, then normalised in float32.
        """
        levels = (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        mean, std = np.array([self.mean, self.std], dtype=np.float32)
        table: Pixels = (levels[:, None] - mean) / std
        return table[pixels, np.arange(3)]

    def denormalize(self, pixels: Pixels) -> npt.NDArray[np.uint8]:
        """What `normalize` was given."""
        mean, std = np.array([self.mean, self.std], dtype=np.float32)
        levels = (pixels * std + mean) / self.rescale_factor
        return np.clip(np.rint(levels), 0, 255).astype(np.uint8)

    def num_tiles(self, size: Size) -> int:
        """How many `tiles` an image of (height, width) has."""
        return sum(len(view.corners) for view in self._views(size))

    def num_tokens(self, size: Size) -> int:
        """How many positions an image of (height, width) takes in the prompt."""
        return num_tokens(size if self.mode == "anyres" else None, self.config)
