"""What the model reads, of prompts, images and videos.

B prompts, L tokens (the longest prompt; shorter ones are padded on the left), N tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from PIL import Image

from mlx_llava.inputs import html as display
from mlx_llava.inputs.image_processor import ImageProcessor, Pixels
from mlx_llava.model.anyres import ImageSizes
from mlx_llava.model.positions import Ids


class FramesTaken(NamedTuple):
    """What was taken of a video.

    Attributes:
        frames: how many frames.
        frame_tokens: how many tokens each of them takes, in all of its features.
        images: which they are of all images in the prompt.
    """

    frames: int
    frame_tokens: int
    images: range


@dataclass(frozen=True)
class Inputs:
    """What `Llava` reads; unpacks with ``**`` into `Llava.__call__` and `Llava.embed`.

    The arrays are NumPy's, which any thread may make; the model makes them MLX's.

    Attributes:
        input_ids: int32 (B, L), one placeholder id for each image feature.
        pixel_values: float32 (N, S, S, 3), all tiles of all images in reading order.
        image_sizes: the (height, width) of each image that is cut into tiles, `Frames` of a video
            that is read as one, None for another; None where none is.
        attention_mask: int32 (B, L), 0 for padding; None where no row is padded.
        prompts: the texts as the model reads them, each image as ``<image x COUNT>``.
        image_tokens: how many placeholders each image takes.
        whole_image_tokens: how many it would take with all of its features.
        image_tiles: how many of the tiles are each image's.
        videos: what was taken of each video.
        prefill: how the answer begins.
        seconds: how long all of this took to prepare.
        image_processor: what cut the images.
    """

    input_ids: Ids
    pixel_values: Pixels | None
    image_sizes: ImageSizes
    attention_mask: Ids | None
    prompts: tuple[str, ...]
    image_tokens: tuple[int, ...]
    whole_image_tokens: tuple[int, ...]
    image_tiles: tuple[int, ...]
    videos: tuple[FramesTaken, ...]
    prefill: str
    seconds: float
    image_processor: ImageProcessor = field(repr=False)

    def keys(self) -> Iterator[str]:
        """The model's arguments, for ``**inputs``."""
        is_whole = self.image_tokens == self.whole_image_tokens
        keys = "input_ids", "pixel_values", "image_sizes", "attention_mask"
        return iter(keys if is_whole else (*keys, "image_tokens"))

    @property
    def positions(self) -> int:
        """How far one prompt goes, as features that are left out keep their positions."""
        return self.input_ids.shape[1] + sum(self.whole_image_tokens) - sum(self.image_tokens)

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key)

    def tiles(self) -> list[Image.Image]:
        """The tiles as images: all that the model sees of what was given."""
        if self.pixel_values is None:
            return []
        pixels = self.image_processor.denormalize(self.pixel_values)
        return [Image.fromarray(tile) for tile in pixels]

    def _repr_html_(self) -> str:
        """What Jupyter shows: the tiles, the prompts, the shapes."""
        arrays = ((key, self[key]) for key in ("input_ids", "pixel_values", "attention_mask"))
        rows = {key: "x".join(map(str, a.shape)) for key, a in arrays if a is not None}
        if self.image_tokens:
            counts = zip(self.whole_image_tokens, self.image_tokens, strict=True)
            rows["image_tokens"] = ", ".join(in_part(*pair) for pair in counts)
        shown = display.pictures(self.tiles()), display.texts(self.prompts), display.table(rows)
        return "".join(shown)


def in_part(whole: int, shown: int) -> str:
    """How many tokens images take, of how many: ``576 -> 192``, or ``576`` where it is all."""
    return f"{whole}" if shown == whole else f"{whole} -> {shown}"
