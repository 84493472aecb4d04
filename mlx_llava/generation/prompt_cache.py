"""What a model has read before: features of images, and keys and values of prompts.

A prompt is compared by its token ids and, where an image stands, by the hash of the image's
pixels, so that nothing of one image is ever used for another.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, TypeAlias, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_llava.checkpoint.safetensors import write_arrays
from mlx_llava.files import whole_file
from mlx_llava.inputs.image_processor import Pixels
from mlx_llava.inputs.inputs import Inputs
from mlx_llava.model.anyres import Layout
from mlx_llava.model.cache import Cache, fork, nbytes, set_positions
from mlx_llava.model.config import LlavaConfig
from mlx_llava.model.image_tokens import ShownImage, positions_after
from mlx_llava.model.llava import Llava
from mlx_llava.model.positions import Part, Positions, positions_of

#: A token id, or the hash of the image that has a placeholder here.
Key: TypeAlias = "int | str"

_FORMAT = "mlx_llava prompt cache 1"


@dataclass(frozen=True)
class _Image:
    """One image of a prompt.

    Attributes:
        digest: the hash of its content, and of how many of its features are shown.
        pixel_values: its tiles, (n, S, S, 3).
        size: its own (height, width), where the model cuts it into tiles; `Frames` of a video.
        positions: its placeholders' in the prompt.
    """

    digest: str
    pixel_values: Pixels
    size: Layout
    positions: range


def _images(inputs: Inputs, config: LlavaConfig) -> Iterator[_Image]:
    if inputs.pixel_values is None:
        return
    placeholders = np.flatnonzero(config.are_placeholders(inputs.input_ids[0]))
    sizes = inputs.image_sizes or [None] * len(inputs.image_tokens)
    tile = seen = 0
    images = zip(
        inputs.image_tokens, inputs.whole_image_tokens, inputs.image_tiles, sizes, strict=True
    )
    for count, total, tiles, size in images:
        pixels = inputs.pixel_values[tile : tile + tiles]
        shown = () if count == total else (count,)
        digest = hashlib.sha256(repr((size, pixels.shape, *shown)).encode())
        digest.update(np.ascontiguousarray(pixels).data)
        start = int(placeholders[seen])
        yield _Image(digest.hexdigest(), pixels, size, range(start, start + count))
        tile, seen = tile + tiles, seen + count


class Prompt:
    """One row of inputs, as it is compared with others.

    Attributes:
        input_ids: its tokens, (1, L).
        images: its images in reading order.
        keys: an id for each token, a hash for each placeholder.
    """

    def __init__(self, inputs: Inputs, config: LlavaConfig) -> None:
        self.input_ids = inputs.input_ids
        self.images = list(_images(inputs, config))
        self.keys: list[Key] = inputs.input_ids[0].tolist()
        for image in self.images:
            for position in image.positions:
                self.keys[position] = image.digest

    def shared_prefix(self, keys: Sequence[Key]) -> int:
        """How many of the first positions are those of `keys`.

        Never the last position, for its logits are needed; and never a part of an image.
        """
        pairs = zip(self.keys[:-1], keys, strict=False)
        whole = min(len(self.keys) - 1, len(keys))
        length = next((i for i, (a, b) in enumerate(pairs) if a != b), whole)
        cut = [image.positions.start for image in self.images if length in image.positions]
        return min([length, *cut])


class PromptCache:
    """Reuses what a model computed for earlier prompts.

    Attributes:
        model: whose keys, values and features they are.
        max_bytes: how much memory keys and values may take; the oldest are forgotten.
        sources: where the images and the videos of the last prompt came from, for its file.
    """

    _numbers = iter(range(sys.maxsize))

    def __init__(
        self, model: Llava, max_bytes: int = 2 << 30, max_feature_bytes: int = 256 << 20
    ) -> None:
        self.model = model
        self.max_bytes = max_bytes
        self.sources: tuple[list[str], list[str]] = ([], [])
        self._max_feature_bytes = max_feature_bytes
        self._features: dict[str, ShownImage] = {}  # of images by hash; as the entries
        self._entries: list[tuple[list[Key], Cache]] = []  # the last used one is the last
        self._number = next(self._numbers)

    @property
    def order(self) -> dict[str, int]:
        """By which other ranks make one that is like it, or know theirs."""
        limits = {"max_bytes": self.max_bytes, "max_feature_bytes": self._max_feature_bytes}
        return {"number": self._number, **limits}

    @cached_property
    def _identity(self) -> str:
        return fingerprint(self.model)

    def begin(self, inputs: Inputs, empty: Cache) -> tuple[Prompt, Cache, int]:
        """The longest cached prefix of a prompt, within the limits of an empty cache for it.

        Returns:
            The prompt, a cache to go on with, and how many of its positions that holds.
        """
        prompt = Prompt(inputs, self.model.config)
        lengths = [
            prompt.shared_prefix(keys) if _kind(cache) == _kind(empty) else 0
            for keys, cache in self._entries
        ]
        length = max(lengths, default=0)
        if not length:
            return prompt, empty, 0
        best = self._entries.pop(lengths.index(length))
        self._entries.append(best)
        return prompt, fork(best[1], length, like=empty), length

    def embed(self, prompts: Sequence[tuple[Prompt, Cache]]) -> list[mx.array]:
        """Embeds prompts after what is in the cache of each; images of all of them together.

        The caches get to know where the tokens of images that are shown in part stand.

        Returns:
            list of mx.array: (1, positions, D) of each prompt.
        """
        new = [
            [image for image in prompt.images if image.positions.start >= cache[0].offset]
            for prompt, cache in prompts
        ]
        shown = self._features_of(chain(*new))
        embeddings = []
        for (prompt, cache), images in zip(prompts, new, strict=True):
            ids = prompt.input_ids[:, cache[0].offset :]
            features = [shown[image.digest].features for image in images]
            embeddings.append(self.model.embed(ids, image_features=features))
            starts = [(image.positions.start, shown[image.digest]) for image in images]
            set_positions(cache, positions_after(starts, positions_of(cache[0])))
        return embeddings

    def _features_of(self, images: Iterable[_Image]) -> dict[str, ShownImage]:
        """The features of images by hash; those that are not kept are encoded together."""
        requested = {image.digest: image for image in images}
        new = {h: image for h, image in requested.items() if h not in self._features}
        if new:
            pixels = np.concatenate([image.pixel_values for image in new.values()])
            sizes = [image.size for image in new.values()]
            counts = [len(image.positions) for image in new.values()]
            encoded = self.model.show_images(pixels, sizes, counts)
            mx.eval([image.features for image in encoded])
            self._features.update(zip(new, encoded, strict=True))
        found = {digest: self._features.pop(digest) for digest in requested}
        self._features.update(found)
        while (
            sum(image.features.nbytes for image in self._features.values())
            > self._max_feature_bytes
        ):
            self._features.pop(next(iter(self._features)))
        return found

    def store(self, prompt: Prompt, tokens: Sequence[int], cache: Cache) -> None:
        """Keeps the keys and values of a prompt and the answer that came of it."""
        length = cache[0].offset
        whole = all(layer.is_trimmable() and layer.offset == length for layer in cache)
        if not length or not whole:
            return  # it was interrupted, or has dropped positions
        keys = [*prompt.keys, *tokens][:length]
        self._entries = [entry for entry in self._entries if entry[0] != keys[: len(entry[0])]]
        kept = fork(cache, len(keys))
        # So that another thread can go on from it.
        mx.eval([(layer.keys, layer.values) for layer in kept])
        self._entries.append((keys, kept))
        del self._entries[: self.model.ranks.decide(self._beyond)]

    def _beyond(self) -> int:
        """How many entries are too many."""
        sizes = [nbytes(cache) for _, cache in reversed(self._entries)]
        return sum(total > self.max_bytes for total in accumulate(sizes))

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
            "sources": json.dumps(self.sources),
            "parts": json.dumps(
                [[p.start, p.kept.tolist(), p.total] for p in positions_of(cache[0]).parts]
            ),
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
        parts = json.loads(metadata.get("parts", "[]"))  # of files before there were any, none
        shown = (Part(start, np.array(kept, np.int32), total) for start, kept, total in parts)
        set_positions(empty, Positions(tuple(shown)))
        images, videos = json.loads(metadata.get("sources", "[[], []]"))
        self.sources = (images, videos)
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
