"""LLaVA: embed the text, encode the image, project, replace the placeholders, decode.

B rows, L tokens, D decoder width, V vocabulary, N tiles of H = W pixels, P patches of each, F
features of all images.
Liu et al. 2023 (arXiv:2304.08485); anyres: LLaVA-NeXT, llava_arch.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_llava.model import clip, siglip
from mlx_llava.model.anyres import ImageSizes
from mlx_llava.model.cache import LayerCache
from mlx_llava.model.clip import VisionTower
from mlx_llava.model.config import LlavaConfig
from mlx_llava.model.image_tokens import ShownImage, positions_after, show
from mlx_llava.model.layers import AnyArray
from mlx_llava.model.layout import lay_out, pool_first
from mlx_llava.model.llama import LanguageModel
from mlx_llava.model.positions import Ids
from mlx_llava.model.projector import Projector
from mlx_llava.model.ranks import ALONE, Alone
from mlx_llava.model.vision_config import VisionConfig

#: How many tiles go through the vision tower together.
TILES_AT_ONCE = 8


def vision_tower(config: VisionConfig) -> VisionTower:
    """CLIP or SigLIP."""
    transformer = siglip.VisionTransformer if config.is_siglip else clip.VisionTransformer
    return VisionTower(config.image_size, transformer(config))


def merge(embeddings: mx.array, features: mx.array, is_image: mx.array) -> mx.array:
    """Puts image features where placeholders are, in reading order.

    Args:
        embeddings (mx.array): (B, L, D).
        features (mx.array): (F, D), of all images of all rows.
        is_image (mx.array): bool (B, L), true F times.

    Returns:
        mx.array: (B, L, D).
    """
    index = mx.maximum(mx.cumsum(is_image.flatten().astype(mx.int32)) - 1, 0)  # (B L,)
    replaced = features.astype(embeddings.dtype)[index].reshape(embeddings.shape)  # (B, L, D)
    return mx.where(is_image[..., None], replaced, embeddings)


def check_count(is_image: mx.array, features: mx.array) -> None:
    """Raises ValueError unless there is one placeholder for each feature."""
    count = int(is_image.sum())
    if count != len(features):
        raise ValueError(
            f"The prompt has {count} image tokens but the images give {len(features)} features."
        )


class Llava(nn.Module):
    """A LLaVA 1.5 or 1.6 model.

    Attributes:
        vision_device: where images are encoded; None is MLX's default device.
        ranks: the processes that run it together.
    """

    ranks: Alone = ALONE

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_device: mx.DeviceType | None = None
        self.vision_tower = vision_tower(config.vision_config)
        self.multi_modal_projector = Projector(config)
        self.language_model = LanguageModel(config.text_config, config.tie_word_embeddings)
        if config.has_newline:
            self.image_newline = mx.zeros((config.text_config.hidden_size,))

    def encode_images(
        self, pixel_values: AnyArray, image_sizes: ImageSizes = None
    ) -> list[mx.array]:
        """Encodes and projects images, some tiles at a time to bound memory.

        Args:
            pixel_values (array): The tiles of all images in order, (N, H, W, 3).
            image_sizes (sequence of (height, width), optional): The own sizes of images that are
                cut into tiles, None for one that is a tile, `Frames` for a video; without them
                every tile is an image.

        Returns:
            list[mx.array]: The features of each image, (tokens, D).
        """
        with mx.stream(self.vision_device or mx.default_device()):
            return self.project(self.features(pixel_values), image_sizes)

    def features(self, pixel_values: AnyArray) -> mx.array:
        """What `select` gives of all tiles, (N, P, width), encoded some at a time."""
        depth, N = max(self.config.feature_layers), len(pixel_values)
        step = N if self.training else TILES_AT_ONCE
        chunks = []
        for start in range(0, N, step):
            hidden_states = self.vision_tower(pixel_values[start : start + step], depth)
            chunks.append(self.select(hidden_states))  # (step, P, width)
            if step < N:
                mx.eval(chunks[-1])
        return mx.concatenate(chunks)

    def show_images(
        self,
        pixel_values: AnyArray,
        image_sizes: ImageSizes,
        image_tokens: Sequence[int],
    ) -> list[ShownImage]:
        """What `encode_images` gives, each image in as many features as it has tokens."""
        features = self.encode_images(pixel_values, image_sizes)
        sizes = [None] * len(features) if image_sizes is None else image_sizes
        images = zip(features, image_tokens, sizes, strict=True)
        return [show(*image, self.config) for image in images]

    def select(self, hidden_states: Sequence[mx.array]) -> mx.array:
        """The chosen hidden states side by side, and of their tokens the chosen ones."""
        chosen = [hidden_states[layer] for layer in self.config.feature_layers]
        features = mx.concatenate(chosen, axis=-1)  # (N, tokens, width)
        return features[:, 1:] if self.config.drops_first else features  # (N, P, width)

    def project(self, features: mx.array, image_sizes: ImageSizes = None) -> list[mx.array]:
        """What `encode_images` gives, from what `select` gives."""
        newline = self.image_newline if self.config.has_newline else None
        features = pool_first(features, image_sizes, self.config)
        features = self.multi_modal_projector(features)  # (N, P, D)
        return lay_out(features, newline, image_sizes, self.config)

    def embed(
        self,
        input_ids: AnyArray,
        pixel_values: AnyArray | None = None,
        image_sizes: ImageSizes = None,
        attention_mask: AnyArray | None = None,  # noqa: ARG002 - so that **inputs fits
        image_features: Sequence[mx.array] | None = None,
        image_tokens: Sequence[int] | None = None,
    ) -> mx.array:
        """Embeds a prompt and its images, which have to be whole.

        Args:
            input_ids (array): Of MLX or NumPy, (B, L), with one placeholder id for every image
                feature.
            pixel_values (array, optional): See `encode_images`.
            image_sizes (sequence of (height, width), optional): See `encode_images`.
            attention_mask (array, optional): Not needed here.
            image_features (list of mx.array, optional): What `encode_images` gave, instead of
                pixels.
            image_tokens (sequence of int, optional): Refused: where images are shown in part,
                tokens stand where embeddings alone do not say.

        Returns:
            mx.array: Embeddings (B, L, D).

        Raises:
            ValueError: There are more or fewer placeholders than features, or images are shown
                in part.
        """
        if image_tokens is not None:
            raise ValueError(
                f"The images are shown in {sum(image_tokens)} tokens, whose positions are not in "
                "embeddings; call the model, or stream_generate."
            )
        input_ids = mx.array(input_ids)
        is_image = self.config.are_placeholders(input_ids)  # (B, L)
        # The placeholder's id may lie outside the embedding table.
        embeddings = self.language_model.embed(mx.where(is_image, 0, input_ids))  # (B, L, D)
        if pixel_values is not None:
            image_features = self.encode_images(pixel_values, image_sizes)
        none = mx.zeros((0, embeddings.shape[-1]))
        features = mx.concatenate(list(image_features)) if image_features else none  # (F, D)
        if not self.training:  # where nothing may wait for the device, and `Examples` has counted
            check_count(is_image, features)
        return merge(embeddings, features, is_image) if len(features) else embeddings

    def __call__(
        self,
        input_ids: AnyArray,
        pixel_values: AnyArray | None = None,
        image_sizes: ImageSizes = None,
        attention_mask: AnyArray | None = None,
        cache: Sequence[LayerCache] | None = None,
        image_tokens: Sequence[int] | None = None,
    ) -> mx.array:
        """Runs the whole model; ``model(**processor(prompt, images))``.

        Returns:
            mx.array: Logits (B, L, V).
        """
        mask = None if attention_mask is None else mx.array(attention_mask)
        if pixel_values is None or image_tokens is None:
            embeddings = self.embed(input_ids, pixel_values, image_sizes)  # (B, L, D)
            positions = None
        else:
            images = self.show_images(pixel_values, image_sizes, image_tokens)
            features = [image.features for image in images]
            embeddings = self.embed(input_ids, image_features=features)  # (B, L, D)
            positions = self._positions(input_ids, mask, images)
        return self.language_model(
            input_embeddings=embeddings, attention_mask=mask, cache=cache, positions=positions
        )

    def _positions(
        self, input_ids: AnyArray, mask: mx.array | None, images: Sequence[ShownImage]
    ) -> Ids | None:
        """Those of padded rows, (B, L), or None where all images are whole."""
        if all(len(image.kept) == image.total for image in images):
            return None
        remaining, rows = iter(images), []
        for i, ids in enumerate(np.array(input_ids)):
            placeholders = np.flatnonzero(self.config.are_placeholders(ids))
            shown = []
            while len(placeholders):
                shown.append((int(placeholders[0]), next(remaining)))
                placeholders = placeholders[len(shown[-1][1].kept) :]
            padding = 0 if mask is None else int(mx.argmax(mask[i] > 0))
            rows.append(positions_after(shown).of(len(ids)) - padding)
        return np.stack(rows)
