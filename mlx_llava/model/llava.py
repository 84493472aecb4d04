"""LLaVA: embed the text, encode the picture, project, replace the placeholders, decode.

B rows, L tokens, D decoder width, V vocabulary, N tiles of H = W pixels, F image features.
Liu et al. 2023 (arXiv:2304.08485); anyres: LLaVA-NeXT, llava_arch.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_llava.model.anyres import Size, grid_size, num_tiles, unpadded_grid
from mlx_llava.model.cache import Cache
from mlx_llava.model.clip import AnyArray, CLIPVisionTower
from mlx_llava.model.config import LlavaConfig
from mlx_llava.model.llama import LanguageModel
from mlx_llava.model.projector import Projector

#: How many tiles go through the vision tower together.
TILES_AT_ONCE = 8


def merge(embeddings: mx.array, features: mx.array, is_image: mx.array) -> mx.array:
    """Puts image features in the places that wait for them, in reading order.

    Args:
        embeddings (mx.array): (B, L, D).
        features (mx.array): (F, D), of all pictures of all rows.
        is_image (mx.array): bool (B, L), true in F places.

    """
    index = mx.maximum(mx.cumsum(is_image.flatten().astype(mx.int32)) - 1, 0)
    replaced = features.astype(embeddings.dtype)[index].reshape(embeddings.shape)
    return mx.where(is_image[..., None], replaced, embeddings)


def check_places(is_image: mx.array, features: mx.array) -> None:
    """Raises ValueError unless there is one place for each feature."""
    places = int(is_image.sum())
    if places != len(features):
        raise ValueError(
            f"The prompt has {places} image tokens but the images give {len(features)} features."
        )


def lay_out(
    features: mx.array,
    newline: mx.array | None,
    image_sizes: Sequence[Size] | None,
    config: LlavaConfig,
) -> list[mx.array]:
    """Puts the features of tiles in the order that pictures have in the prompt.

    Args:
        features (mx.array): Of all tiles of all pictures, (N, P, D).
        newline (mx.array, optional): What ends a line, (D,), in models that have it.
        image_sizes (sequence of (height, width), optional): The pictures' own sizes, for anyres;
            without them every tile is a picture.
        config (LlavaConfig): How it is done.

    Returns:
        list[mx.array]: Those of each picture, (tokens, D).

    Raises:
        ValueError: Tiles and sizes do not match.
    """
    if image_sizes is None:
        return (
            list(features)
            if newline is None
            else [_lines(tile[None], newline) for tile in features]
        )
    counts = [1 + num_tiles(size, config) for size in image_sizes]
    if sum(counts) != len(features):
        raise ValueError(
            f"pixel_values have {len(features)} tiles but image_sizes need {sum(counts)}."
        )
    ends = [sum(counts[: i + 1]) for i in range(len(counts) - 1)]
    pictures = zip(mx.split(features, ends), image_sizes, strict=True)
    return [_lay_out_tiles(tiles, newline, size, config) for tiles, size in pictures]


def _lay_out_tiles(
    tiles: mx.array, newline: mx.array | None, size: Size, config: LlavaConfig
) -> mx.array:
    """One picture's tiles (1 + n, P, D) -> the whole, then its grid row by row."""
    if config.mm_patch_merge_type == "flat":
        return tiles.flatten(0, 1)
    patches = config.vision_config.patches_per_side
    rows, columns = grid = grid_size(size, config)
    shape = (rows // patches, columns // patches, patches, patches, -1)
    whole = tiles[1:].reshape(shape).transpose(0, 2, 1, 3, 4).reshape(rows, columns, -1)
    if newline is None:
        return mx.concatenate([tiles[0], whole.flatten(0, 1)])
    shown = whole[unpadded_grid(size, grid, config.anyres_convention)]
    return mx.concatenate([tiles[0], _lines(shown, newline)])


def _lines(grid: mx.array, newline: mx.array) -> mx.array:
    """Ends each row of (rows, columns, D) with the newline feature and flattens it."""
    rows, _, D = grid.shape
    newlines = mx.broadcast_to(newline.astype(grid.dtype), (rows, 1, D))
    return mx.concatenate([grid, newlines], axis=1).flatten(0, 1)


class Llava(nn.Module):
    """A LLaVA 1.5 or 1.6 model.

    Attributes:
        vision_device: where pictures are encoded; None is MLX's default device.
    """

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_device: mx.DeviceType | None = None
        self.vision_tower = CLIPVisionTower(config.vision_config)
        self.multi_modal_projector = Projector(config)
        self.language_model = LanguageModel(config.text_config, config.tie_word_embeddings)
        if config.has_newline:
            self.image_newline = mx.zeros((config.text_config.hidden_size,))

    def encode_images(
        self, pixel_values: AnyArray, image_sizes: Sequence[Size] | None = None
    ) -> list[mx.array]:
        """Encodes and projects pictures.

        Args:
            pixel_values (array): The tiles of all pictures in order, (N, H, W, 3).
            image_sizes (sequence of (height, width), optional): The pictures' own sizes, for
                anyres; without them every tile is a picture.

        Returns:
            list[mx.array]: The features of each picture, (tokens, D).
        """
        with mx.stream(self.vision_device or mx.default_device()):
            return self._project(self._vision_features(pixel_values), image_sizes)

    def project(
        self, hidden_states: Sequence[mx.array], image_sizes: Sequence[Size] | None = None
    ) -> list[mx.array]:
        """What `encode_images` gives, from the hidden states of the vision tower."""
        return self._project(self._select(hidden_states), image_sizes)

    def _project(self, features: mx.array, image_sizes: Sequence[Size] | None) -> list[mx.array]:
        newline = self.image_newline if self.config.has_newline else None
        return lay_out(self.multi_modal_projector(features), newline, image_sizes, self.config)

    def _vision_features(self, pixel_values: AnyArray) -> mx.array:
        """The chosen hidden states of all tiles, some tiles at a time to bound memory."""
        if self.training or len(pixel_values) <= TILES_AT_ONCE:
            return self._tower_features(pixel_values)
        chunks = []
        for start in range(0, len(pixel_values), TILES_AT_ONCE):
            chunks.append(self._tower_features(pixel_values[start : start + TILES_AT_ONCE]))
            mx.eval(chunks[-1])
        return mx.concatenate(chunks)

    def _tower_features(self, pixel_values: AnyArray) -> mx.array:
        return self._select(self.vision_tower(pixel_values, max(self.config.feature_layers)))

    def _select(self, hidden_states: Sequence[mx.array]) -> mx.array:
        """The chosen ones, side by side, and of their tokens the chosen ones."""
        chosen = [hidden_states[layer] for layer in self.config.feature_layers]
        features = mx.concatenate(chosen, axis=-1)
        if self.config.vision_feature_select_strategy == "default":
            return features[:, 1:]
        return features

    def embed(
        self,
        input_ids: AnyArray,
        pixel_values: AnyArray | None = None,
        image_sizes: Sequence[Size] | None = None,
        attention_mask: AnyArray | None = None,  # noqa: ARG002 - so that **inputs fits
        image_features: Sequence[mx.array] | None = None,
    ) -> mx.array:
        """Embeds a prompt and its pictures.

        Args:
            input_ids (array): Of MLX or NumPy, (B, L), with one placeholder id for every image
                feature.
            pixel_values (array, optional): See `encode_images`.
            image_sizes (sequence of (height, width), optional): See `encode_images`.
            attention_mask (array, optional): Not needed here.
            image_features (list of mx.array, optional): What `encode_images` gave for the
                pictures, instead of their pixels.

        Returns:
            mx.array: Embeddings (B, L, D).

        Raises:
            ValueError: There are more or fewer placeholders than features.
        """
        input_ids = mx.array(input_ids)
        is_image = input_ids == self.config.image_token_index
        # The placeholder's id may lie outside the embedding table.
        embeddings = self.language_model.embed(mx.where(is_image, 0, input_ids))
        if pixel_values is not None:
            image_features = self.encode_images(pixel_values, image_sizes)
        none = mx.zeros((0, embeddings.shape[-1]))
        features = mx.concatenate(list(image_features)) if image_features else none
        if not self.training:  # where nothing may wait for the device, and `Examples` has counted
            check_places(is_image, features)
        return merge(embeddings, features, is_image) if len(features) else embeddings

    def __call__(
        self,
        input_ids: AnyArray,
        pixel_values: AnyArray | None = None,
        image_sizes: Sequence[Size] | None = None,
        attention_mask: AnyArray | None = None,
        cache: Cache | None = None,
    ) -> mx.array:
        """Runs the whole model; ``model(**processor(prompt, images))``.

        Returns:
            mx.array: Logits (B, L, V).
        """
        embeddings = self.embed(input_ids, pixel_values, image_sizes)
        mask = None if attention_mask is None else mx.array(attention_mask)
        return self.language_model(input_embeddings=embeddings, attention_mask=mask, cache=cache)
