"""Grids of tiles become sequences as transformers makes them, to the order and the count."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_llava.inputs.image_processor import ImageProcessor
from mlx_llava.model.anyres import Frames, laid_grid, num_tiles, num_tokens, unpadded_grid
from mlx_llava.model.config import LlavaConfig
from mlx_llava.model.image_tokens import areas_of
from mlx_llava.model.layout import interpolate, lay_out

torch = pytest.importorskip("torch", reason="the oracle: pip install '.[test]'")
onevision = pytest.importorskip("transformers.models.llava_onevision.modeling_llava_onevision")
hf = pytest.importorskip("transformers")

RANDOM = np.random.default_rng(0)
#: From a strip to a square, and from a stamp to 16 megapixels.
SIZES = [
    (int(2 ** (side - lean)), int(2 ** (side + lean)))
    for side, lean in RANDOM.uniform((6, -1.5), (12, 1.5), (200, 2))
]


def config(tiles: int = 9) -> LlavaConfig:
    """OneVision as transformers has it where config.json says nothing else."""
    ratio = f"anyres_max_{tiles}"
    return LlavaConfig.from_dict({"model_type": "llava_onevision", "vision_aspect_ratio": ratio})


def packed(tiles: np.ndarray, newline: np.ndarray, size: tuple[int, int], max_tiles: int):
    """What transformers makes of one image's tiles."""
    model = SimpleNamespace(config=hf.LlavaOnevisionConfig())
    (features,), _ = onevision.LlavaOnevisionModel.pack_image_features(
        model,
        [torch.tensor(tiles)],
        torch.tensor([size]),
        torch.tensor(newline),
        f"anyres_max_{max_tiles}",
    )
    return features.numpy()


def expected_tokens(size: tuple[int, int], max_tiles: int) -> int:
    """How many placeholders transformers' processor writes for one image."""
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(
            image_grid_pinpoints=hf.LlavaOnevisionConfig().image_grid_pinpoints
        ),
        num_image_tokens=729,
        vision_aspect_ratio=f"anyres_max_{max_tiles}",
    )
    found = hf.LlavaOnevisionProcessor
    processor._get_unpadded_features = found._get_unpadded_features.__get__(processor)
    return found._get_number_of_features(processor, *size, 384, 384)


def test_onevision_counts_and_orders_features_as_transformers_on_200_sizes():
    settings, newline = config(), np.full(1, 7.0, np.float32)
    images = ImageProcessor.from_config(None, settings)
    scaled = 0
    for size in SIZES:
        tiles = RANDOM.normal(size=(1 + num_tiles(size, settings), 729, 1)).astype(np.float32)
        theirs = packed(tiles, newline, size, 9)
        (ours,) = lay_out(mx.array(tiles), mx.array(newline), [size], settings)
        assert images.num_tokens(size) == len(theirs) == expected_tokens(size, 9)
        assert np.abs(np.array(ours) - theirs).max() < 2e-6
        shown = unpadded_grid(size, settings)
        scaled += laid_grid(size, settings) != tuple(part.stop - part.start for part in shown)
    assert 30 < scaled < 170  # both ways are tried


def pooled(frames: torch.Tensor, newline: torch.Tensor, mode: str, position: str) -> torch.Tensor:
    """What LLaVA-NeXT makes of a video's frames (llava_arch.py), line by line."""
    how = {
        "bilinear": lambda grid: torch.nn.functional.interpolate(
            grid, [-(-side // 2) for side in grid.shape[2:]], mode="bilinear"
        ),
        "average": lambda grid: torch.nn.functional.avg_pool2d(grid, 2),
        "max": lambda grid: torch.nn.functional.max_pool2d(grid, 2),
    }
    features = []
    for frame in how[mode](frames.unflatten(1, (27, 27)).permute(0, 3, 1, 2)):
        for row in frame.permute(1, 2, 0):
            features += [*row, *([newline] if position == "grid" else [])]
        features += [newline] if position == "frame" else []
    return torch.stack([*features, *([newline] if position == "one_token" else [])])


@pytest.mark.parametrize("position", ["one_token", "frame", "grid", "no_token"])
@pytest.mark.parametrize("mode", ["bilinear", "average", "max"])
def test_frames_are_pooled_and_end_in_lines_as_llava_video_has_them(mode, position):
    settings = replace(config(), mm_spatial_pool_mode=mode, mm_newline_position=position)
    frames, newline = RANDOM.normal(size=(3, 729, 2)), np.full(2, 7.0)
    frames, newline = frames.astype(np.float32), newline.astype(np.float32)
    theirs = pooled(torch.tensor(frames), torch.tensor(newline), mode, position).numpy()
    (ours,) = lay_out(mx.array(frames), mx.array(newline), [Frames(3)], settings)
    assert num_tokens(Frames(3), settings) == len(theirs)
    assert np.abs(np.array(ours) - theirs).max() < 2e-6
    areas = areas_of(len(theirs), Frames(3), settings)
    assert [*np.concatenate(areas)] == [*range(len(theirs))]
    assert max(map(len, areas)) - min(map(len, areas)) <= 1


@pytest.mark.parametrize("max_tiles", [1, 4, 16])
def test_another_most_of_tiles_is_followed(max_tiles):
    settings, newline = config(max_tiles), np.zeros(1, np.float32)
    for size in SIZES[:20]:
        tiles = np.arange((1 + num_tiles(size, settings)) * 729, dtype=np.float32)
        tiles = tiles.reshape(-1, 729, 1)
        (ours,) = lay_out(mx.array(tiles), mx.array(newline), [size], settings)
        theirs = packed(tiles, newline, size, max_tiles)
        assert len(ours) == ImageProcessor.from_config(None, settings).num_tokens(size)
        assert np.allclose(np.array(ours), theirs, rtol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (27, 13), (14, 14), (40, 60)])
def test_grids_are_interpolated_as_pytorch_does(size):
    grid = RANDOM.normal(size=(3, 27, 27, 4)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(grid).permute(0, 3, 1, 2), size, mode="bilinear"
    )
    ours = np.array(interpolate(mx.array(grid), size))
    assert np.abs(ours - theirs.permute(0, 2, 3, 1).numpy()).max() < 2e-6
