"""What rank 0 tells the other ranks to do, as plain data: JSON, and arrays as their bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from itertools import count
from typing import Any

import numpy as np

from mlx_llava.generation.sampling import Options
from mlx_llava.inputs.image_processor import ImageProcessor
from mlx_llava.inputs.inputs import FramesTaken, Inputs
from mlx_llava.model.anyres import Frames, Layout
from mlx_llava.model.ranks import Alone

_ARRAYS = {"input_ids": np.int32, "pixel_values": np.float32, "attention_mask": np.int32}
_FIELDS = ("prompts", "image_tokens", "whole_image_tokens", "image_tiles", "prefill", "seconds")
_LENGTH = struct.Struct(">I")
_numbers = count()


class Orders:
    """What rank 0 has the others do with one thing of theirs, which they know by a number."""

    def __init__(self, ranks: Alone) -> None:
        self._ranks, self._number = ranks, next(_numbers)

    def __call__(
        self, do: str, inputs: Inputs | None = None, options: Options | None = None, **fields: Any
    ) -> None:
        """Tells them; where there are none, or this is none of rank 0, nothing."""

        def message() -> bytes:
            more = {"options": vars(options)} if options else {}
            return pack({"do": do, "of": self._number, **fields, **more}, inputs)

        self._ranks.tell(message)


def pack(fields: Mapping[str, Any], inputs: Inputs | None = None) -> bytes:
    """An order as bytes."""
    if inputs is None:
        arrays: dict[str, Any] = {}
        head = {"fields": fields}
    else:
        arrays = {name: inputs[name] for name in _ARRAYS if inputs[name] is not None}
        shapes = {name: array.shape for name, array in arrays.items()}
        head = {"fields": fields, "shapes": shapes, "inputs": _plain(inputs)}
    text = json.dumps(head).encode()
    contents = [np.ascontiguousarray(a, _ARRAYS[name]).tobytes() for name, a in arrays.items()]
    return b"".join([_LENGTH.pack(len(text)), text, *contents])


def unpack(order: bytes, image_processor: ImageProcessor) -> dict[str, Any]:
    """The fields of an order, with its ``inputs`` if it has any."""
    (length,) = _LENGTH.unpack_from(order)
    start = _LENGTH.size + length
    head = json.loads(order[_LENGTH.size : start])
    fields: dict[str, Any] = head["fields"]
    if "options" in fields:
        fields["options"] = Options(**fields["options"])
    if "inputs" in head:
        arrays: dict[str, Any] = dict.fromkeys(_ARRAYS)
        for name, shape in head["shapes"].items():
            size = int(np.prod(shape))
            arrays[name] = np.frombuffer(order, _ARRAYS[name], size, start).reshape(shape)
            start += arrays[name].nbytes
        fields["inputs"] = Inputs(
            **arrays, **_read(head["inputs"]), image_processor=image_processor
        )
    return fields


def _plain(inputs: Inputs) -> dict[str, Any]:
    sizes: Any = inputs.image_sizes and [
        {"frames": size.frames} if isinstance(size, Frames) else size for size in inputs.image_sizes
    ]
    videos = [(*video[:-1], [*video.images]) for video in inputs.videos]
    return {**{name: inputs[name] for name in _FIELDS}, "videos": videos, "sizes": sizes}


def _read(plain: dict[str, Any]) -> dict[str, Any]:
    sizes = plain.pop("sizes")
    layouts = None if sizes is None else tuple(map(_layout, sizes))
    lists = {name: tuple(value) for name, value in plain.items() if isinstance(value, list)}
    lists["videos"] = tuple(
        FramesTaken(frames, tokens, range(images[0], images[-1] + 1))
        for frames, tokens, images in plain["videos"]
    )
    return {**plain, **lists, "image_sizes": layouts}


def _layout(size: Any) -> Layout:
    if isinstance(size, dict):
        return Frames(**size)
    return None if size is None else (size[0], size[1])
