"""What a model has read before: features of pictures, and keys and values of prompts.

A prompt is known by its token ids and, where a picture stands, by the hash of the picture's
pixels, so that nothing of one picture is ever used for another.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_llava.checkpoint.safetensors import write_arrays
from mlx_llava.files import whole_file
from mlx_llava.inputs.image_processor import Pixels
from mlx_llava.inputs.processor import Inputs
from mlx_llava.model.anyres import Size
from mlx_llava.model.cache import Cache, fork, nbytes
from mlx_llava.model.llava import Llava

#: A token id, or the hash of the picture that has a placeholder here.
Key: TypeAlias = "int | str"

_FORMAT = "mlx_llava prompt cache 1"


@dataclass(frozen=True)
class Picture:
    """One picture of a prompt.

    Attributes:
        digest: the hash of its content.
        pixel_values: its tiles, (n, S, S, 3).
        size: its own (height, width), where the model cuts it into tiles.
        places: its placeholders' positions in the prompt.
    """

    digest: str
    pixel_values: Pixels
    size: Size | None
    places: range


def pictures_of(inputs: Inputs, image_token_index: int) -> list[Picture]:
    """The pictures of one prompt in reading order."""
    if inputs.pixel_values is None:
        return []
    positions = np.flatnonzero(inputs.input_ids[0] == image_token_index)
    pictures = []
    tile = seen = 0
    for i, (count, tiles) in enumerate(zip(inputs.image_tokens, inputs.image_tiles, strict=True)):
        pixels = inputs.pixel_values[tile : tile + tiles]
        size = inputs.image_sizes[i] if inputs.image_sizes else None
        digest = hashlib.sha256(repr((size, pixels.shape)).encode())
        digest.update(np.ascontiguousarray(pixels).data)
        start = int(positions[seen])
        places = range(start, start + count)
        pictures.append(Picture(digest.hexdigest(), pixels, size, places))
        tile, seen = tile + tiles, seen + count
    return pictures


@dataclass(frozen=True)
class Prompt:
    """One row of inputs, known by its content.

    Attributes:
        inputs: what the processor made.
        pictures: its pictures.
        keys: an id for each token, a hash for each placeholder.
    """

    inputs: Inputs
    pictures: list[Picture]
    keys: list[Key]

    @classmethod
    def of(cls, inputs: Inputs, image_token_index: int) -> Prompt:
        """Reads the inputs of one prompt."""
        pictures = pictures_of(inputs, image_token_index)
        keys: list[Key] = inputs.input_ids[0].tolist()
        for picture in pictures:
            for place in picture.places:
                keys[place] = picture.digest
        return cls(inputs, pictures, keys)

    def known(self, keys: Sequence[Key]) -> int:
        """How many of the first positions are those of `keys`.

        The last position is never known, for its logits are wanted; and never part of a picture.
        """
        pairs = zip(self.keys[:-1], keys, strict=False)
        length = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if length is None:
            length = min(len(self.keys) - 1, len(keys))
        cut = [picture.places.start for picture in self.pictures if length in picture.places]
        return min([length, *cut])

    def after(self, known: int) -> list[Picture]:
        """The pictures that stand after the known positions."""
        return [picture for picture in self.pictures if picture.places.start >= known]


class FeatureCache:
    """The features of the pictures that were seen last, up to so many bytes."""

    def __init__(self, model: Llava, max_bytes: int) -> None:
        self.model = model
        self.max_bytes = max_bytes
        self._features: OrderedDict[str, mx.array] = OrderedDict()

    def features(self, pictures: Mapping[str, Picture]) -> dict[str, mx.array]:
        """The features of pictures by hash; those that are not kept are encoded together."""
        found = {h: self._features[h] for h in pictures.keys() & self._features.keys()}
        new = {h: picture for h, picture in pictures.items() if h not in found}
        if new:
            pixels = np.concatenate([picture.pixel_values for picture in new.values()])
            sizes = [picture.size for picture in new.values() if picture.size is not None]
            encoded = self.model.encode_images(pixels, sizes or None)
            mx.eval(encoded)
            found.update(zip(new, encoded, strict=True))
        for digest, features in found.items():
            self._features[digest] = features
            self._features.move_to_end(digest)
        while sum(features.nbytes for features in self._features.values()) > self.max_bytes:
            self._features.popitem(last=False)
        return found


class PromptCache:
    """Reuses what a model computed for earlier prompts.

    Attributes:
        model: whose keys, values and features they are.
        max_bytes: how much memory keys and values may take; the oldest are forgotten.
    """

    def __init__(
        self, model: Llava, max_bytes: int = 2 << 30, max_feature_bytes: int = 256 << 20
    ) -> None:
        self.model = model
        self.max_bytes = max_bytes
        self._images = FeatureCache(model, max_feature_bytes)
        self._entries: list[tuple[list[Key], Cache]] = []  # the last used one is the last

    @cached_property
    def _identity(self) -> str:
        return fingerprint(self.model)

    def prompt(self, inputs: Inputs) -> Prompt:
        """A prompt as it is known here."""
        return Prompt.of(inputs, self.model.config.image_token_index)

    def begin(self, prompt: Prompt, empty: Cache) -> tuple[Cache, int]:
        """The longest known beginning of a prompt.

        Args:
            prompt (Prompt): What will be read.
            empty (list): A cache for it; what others of its kind hold is reused, within its
                limits.

        Returns:
            A cache to go on with, and how many positions of the prompt it holds.
        """
        usable = [entry for entry in self._entries if _kind(entry[1]) == _kind(empty)]
        best = max(usable, key=lambda entry: prompt.known(entry[0]), default=None)
        length = prompt.known(best[0]) if best else 0
        if best is None or not length:
            return empty, 0
        self._entries.remove(best)
        self._entries.append(best)
        return fork(best[1], length, like=empty), length

    def embed(self, prompts: Sequence[Prompt], known: Sequence[int]) -> list[mx.array]:
        """Embeds what is not known of some prompts; pictures of all of them together.

        Returns:
            list of mx.array: (1, positions, D) of each prompt.
        """
        new = [prompt.after(n) for prompt, n in zip(prompts, known, strict=True)]
        features = self._images.features({p.digest: p for pictures in new for p in pictures})
        return [
            self.model.embed(
                prompt.inputs.input_ids[:, n:],
                image_features=[features[picture.digest] for picture in pictures],
            )
            for prompt, n, pictures in zip(prompts, known, new, strict=True)
        ]

    def store(self, prompt: Prompt, tokens: Sequence[int], cache: Cache) -> None:
        """Keeps the keys and values of a prompt and the answer that came of it."""
        length = cache[0].offset
        whole = all(layer.is_trimmable() and layer.offset == length for layer in cache)
        if not length or not whole:
            return  # it was interrupted, or has dropped positions
        keys = [*prompt.keys, *tokens][:length]
        self._entries = [entry for entry in self._entries if entry[0] != keys[: len(entry[0])]]
        kept = fork(cache, length)
        mx.eval(
            [(layer.keys, layer.values) for layer in kept]
        )  # so that another thread can go on from it
        self._entries.append((keys, kept))
        while self._entries and sum(nbytes(entry[1]) for entry in self._entries) > self.max_bytes:
            self._entries.pop(0)

    def save(self, path: str | Path) -> None:
        """Writes the last prompt to a file, with the identity of the model and its pictures."""
        if not self._entries:
            raise ValueError(f"There is nothing to write to {path}: no prompt was kept.")
        keys, cache = self._entries[-1]
        stored = {
            str(i): {"keys": layer.keys, "values": layer.values} for i, layer in enumerate(cache)
        }
        arrays: dict[str, mx.array] = dict(tree_flatten(stored))
        metadata = {
            "format": _FORMAT,
            "model": self._identity,
            "keys": json.dumps(keys),
            "kind": json.dumps(_kind(cache)),
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, ending=".safetensors") as beside:
            write_arrays(beside, arrays, metadata)

    def load(self, path: str | Path, empty: Cache) -> None:
        """Reads what `save` wrote.

        Args:
            path (str or Path): The file.
            empty (list): A cache of the kind that it should hold; is filled.

        Raises:
            ValueError: It is no such file, of another model, or of another kind of cache.
        """
        try:
            loaded = mx.load(str(path), format="safetensors", return_metadata=True)
            arrays, metadata = cast("tuple[dict[str, mx.array], dict[str, str]]", loaded)
        except RuntimeError as error:
            raise ValueError(f"{path} is not a prompt cache: {error}") from error
        advice = "remove it or give another --prompt-cache-file."
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{path} is not a prompt cache of mlx_llava; {advice}")
        if metadata["model"] != self._identity:
            raise ValueError(f"{path} was made with another model; {advice}")
        if json.loads(metadata["kind"]) != _kind(empty):
            raise ValueError(f"{path} was made with other --kv-bits; {advice}")
        keys = json.loads(metadata["keys"])
        layers: Any = tree_unflatten(list(arrays.items()))
        for layer, stored in zip(empty, layers, strict=True):
            layer.keys, layer.values = stored["keys"], stored["values"]
            layer.offset = len(keys)
        self._entries.append((keys, empty))


def _kind(cache: Cache) -> list[int | str]:
    """What tells kinds of caches apart."""
    layer = cache[0]
    return [type(layer).__name__, getattr(layer, "bits", 0), getattr(layer, "group_size", 0)]


def fingerprint(model: Llava) -> str:
    """A hash of a model's config and of 64 numbers of each of its weights."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    for name, array in sorted(weights.items()):
        flat = array.reshape(-1)
        sample = flat[:: max(1, flat.size // 64)]
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(np.array(sample.astype(mx.float32)).tobytes())
    return digest.hexdigest()
