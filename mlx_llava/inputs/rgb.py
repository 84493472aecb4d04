"""Whatever PIL image or array -> an RGB image of 8 bits."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

#: The highest value of 8, 10, 12, 14 and 16 bits.
_HIGHEST = (255, 1023, 4095, 16383, 65535)
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}


class Levels(NamedTuple):
    """What a file says of the values of its pixels."""

    black: float | None = None
    white: float | None = None
    is_inverted: bool = False  # low values are light
    bits: int = 8


UNKNOWN = Levels()


def to_rgb(image: Image.Image, levels: Levels = UNKNOWN, name: str = "The image") -> Image.Image:
    """Converts any PIL mode to RGB, as transformers 5 does.

    The exception are greys of more than 8 bits, which Pillow would clip at 255. Where nothing
    says otherwise, modes ``I;16`` and ``I`` are taken as 16 bits, and ``F`` as 0..1; values
    beyond are stretched, from 0 to the highest. What had to be guessed is said in a warning.
    """
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        grey = to_8_bits(values, *_range(values, levels, name))
        image = Image.fromarray(255 - grey if levels.is_inverted else grey)
    elif levels.bits > 8 and (highest := np.asarray(image.convert("RGB")).max(initial=0)) < 16:
        _warn_of_darkness(highest, f"{name} has colours up to {highest} of 255")  # the upper 8 bits
    if image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white_canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white_canvas, image)
    return image.convert("RGB")


def _range(values: npt.NDArray[Any], levels: Levels, name: str) -> tuple[float, float]:
    is_float = values.dtype.kind == "f"
    finite = values[np.isfinite(values)] if is_float else values
    lowest, highest = float(finite.min(initial=0)), float(finite.max(initial=0))
    nominal = 1 if is_float else 65535
    declared = levels.white or 0
    if declared > nominal or is_float:
        if declared >= max(highest, nominal):
            return min(lowest, levels.black or 0), declared
    elif declared >= highest > 0:
        return 0, next(most for most in _HIGHEST if most >= declared)
    if lowest < 0 or highest > nominal:
        found = f"{lowest:g}..{highest:g}, which its file does not say"
        warnings.warn(f"{name} has values of {found}; that is shown as black..white.", stacklevel=3)
        return lowest, highest
    if not is_float and highest < 4096:
        _warn_of_darkness(highest, f"{name} has values up to {highest:.0f} of 65535")
    return 0, nominal


def _warn_of_darkness(highest: float, found: str) -> None:
    if highest:
        advice = "is shown so dark; if 12 bits are its white, scale it to 16."
        warnings.warn(f"{found}, and {advice}", stacklevel=4)


def from_array(array: npt.NDArray[Any]) -> Image.Image:
    """Turns (H, W) or (H, W, C) of any usual dtype into a PIL image.

    Raises:
        ValueError: It has another shape, dtype or range.
    """
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ValueError(f"An image array must be (H, W) or (H, W, 1|3|4), not {array.shape}.")
    if array.dtype == np.bool_:
        array = array * np.uint8(255)
    elif array.dtype == np.uint16:
        array = to_8_bits(array, 0, 65535)
    elif np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError("A floating-point image array must lie in 0..1.")
        array = to_8_bits(array, 0, 1)
    elif array.dtype != np.uint8:
        kinds = "uint8, uint16, bool or floating point"
        raise ValueError(f"An image array must be {kinds}, not {array.dtype}.")
    return Image.fromarray(np.ascontiguousarray(array))


def to_8_bits(array: npt.NDArray[Any], black: float, white: float) -> npt.NDArray[np.uint8]:
    """Maps black..white to 0..255; what lies beyond is clipped."""
    scaled = np.nan_to_num(array.astype(np.float32), copy=False, posinf=white, neginf=black)
    scaled -= black
    scaled *= 255 / (white - black)
    return np.clip(np.rint(scaled, out=scaled), 0, 255, out=scaled).astype(np.uint8)
