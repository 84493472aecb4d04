"""Images in fewer tokens: which are kept, and where they stand, as transformers would have it."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle: pip install '.[test]'")
tiny = pytest.importorskip("tests.tiny")

from mlx_llava.generation.batch import BatchGenerator, run  # noqa: E402
from mlx_llava.generation.prompt_cache import PromptCache  # noqa: E402
from mlx_llava.generation.sampling import Options  # noqa: E402
from mlx_llava.generation.stream import stream_generate  # noqa: E402
from mlx_llava.model.anyres import grid_size, laid_grid, num_tiles, unpadded_grid  # noqa: E402
from mlx_llava.model.image_tokens import areas_of, most_diverse, show, spread  # noqa: E402
from mlx_llava.model.layout import lay_out  # noqa: E402
from tests.conftest import MACHINES, as_on  # noqa: E402
from tests.conftest import load_as_stored as load  # noqa: E402

TOLERANCE = 3e-5
LENGTH = 8
KEPT = {
    "vicuna": 7,
    "llama3_rope": 1,
    "mistral_window": 5,
    "next": 20,
    "next_mistral": 29,
    "onevision": 11,
}


def chosen_by_torch(features: torch.Tensor, count: int) -> list[int]:
    """DivPrune as its authors write it, but that nothing is chosen twice."""
    unit = features / features.norm(dim=1, keepdim=True)
    distances = 1 - unit @ unit.T
    chosen: list[int] = []
    for _ in range(count):
        if chosen:
            scores = distances[chosen].min(dim=0).values
            scores[chosen] = -1
        else:
            scores = torch.topk(distances, 2, dim=0, largest=False).values[1]
        chosen.append(int(scores.argmax()))
    return chosen


def tiles_by_loops(size, config) -> list[int]:
    """The tile of each feature of a cut image, newline by newline."""
    side = config.vision_config.patches_per_side
    columns = grid_size(size, config)[1] // side
    places = [
        [part.start + int((i + 0.5) * (part.stop - part.start) / count) for i in range(count)]
        for part, count in zip(unpadded_grid(size, config), laid_grid(size, config), strict=True)
    ]
    tiles = [0] * config.tokens_per_tile
    for row in places[0]:
        row_tiles = [1 + row // side * columns + column // side for column in places[1]]
        tiles += [*row_tiles, row_tiles[-1]]
    return tiles


def kept_by_reference(features: torch.Tensor, count: int, size, config) -> list[int]:
    total = len(features)
    if count >= total:
        return list(range(total))
    tiles = [0] * total if size is None else tiles_by_loops(size, config)
    areas = [[i for i in range(total) if tiles[i] == tile] for tile in sorted({*tiles})]
    exact = [count * len(area) / total for area in areas]
    shares = [int(share) for share in exact]
    while sum(shares) < count:
        gaps = [share - whole for share, whole in zip(exact, shares, strict=True)]
        shares[gaps.index(max(gaps))] += 1
    kept = []
    for area, share in zip(areas, shares, strict=True):
        kept += [area[i] for i in chosen_by_torch(features[area], share)]
    return sorted(kept)


class Reference:
    """transformers' decoder on the embeddings that are left, at the positions that they had."""

    def __init__(self, model, case, count: int) -> None:
        self.model, self.case, self.count = model, case, count

    def row(self, prompt: str, pictures: list, config) -> tuple[torch.Tensor, torch.Tensor]:
        images = [pictures] if self.case.onevision else pictures
        batch = tiny.processor(self.case)(
            text=prompt, images=images if pictures else None, return_tensors="pt"
        )
        inner, ids = self.model.model, batch["input_ids"]
        with torch.no_grad():
            embeddings = inner.get_input_embeddings()(ids.clamp(max=319))
            keep = np.ones(ids.shape[1], bool)
            if pictures:
                names = {"image_sizes", "batch_num_images"} & batch.keys()
                sizes = {name: batch[name] for name in names}
                features = inner.get_image_features(batch["pixel_values"], **sizes)
                features = list(getattr(features, "pooler_output", features))
                is_image = ids[0] == self.model.config.image_token_id
                embeddings[0, is_image] = torch.cat(features)
                start = 0
                image_positions = np.flatnonzero(is_image.numpy())
                keep[image_positions] = False
                for one, image in zip(features, pictures, strict=True):
                    is_cut = self.case.next or (self.case.onevision and len(pictures) == 1)
                    size = image.size[::-1] if is_cut else None
                    kept = kept_by_reference(one, self.count, size, config)
                    keep[image_positions[start : start + len(one)][kept]] = True
                    start += len(one)
        positions = torch.tensor(np.flatnonzero(keep))[None]
        return embeddings[:, positions[0]], positions

    def logits(self, embeddings: torch.Tensor, positions: torch.Tensor) -> np.ndarray:
        length = positions.shape[1]
        window = self.case.text.get("sliding_window") or 10**6
        away = positions[0][:, None] - positions[0]
        seen = (torch.ones(length, length).tril() > 0) & (away < window)
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
        text = self.model.model.language_model
        kinds = {"attention_mask": mask}
        with torch.no_grad():
            out = text(inputs_embeds=embeddings, position_ids=positions, **kinds)
            return self.model.lm_head(out.last_hidden_state)[0].numpy()

    def tokens(self, embeddings: torch.Tensor, positions: torch.Tensor, count: int) -> list[int]:
        tokens = []
        for _ in range(count):
            tokens.append(int(self.logits(embeddings, positions)[-1].argmax()))
            new = self.model.model.get_input_embeddings()(torch.tensor([[tokens[-1]]])).detach()
            embeddings = torch.cat([embeddings, new], dim=1)
            positions = torch.cat([positions, positions[:, -1:] + 1], dim=1)
        return tokens


@pytest.mark.parametrize(("name", "count"), KEPT.items())
def test_logits_and_answers_are_those_of_transformers_at_the_kept_positions(name, count, written):
    case = next(case for case in tiny.CASES if case.name == name)
    folder, whole = written(case)
    model, processor = load(folder)
    reference = Reference(whole, case, count)
    prompts, pictures = tiny.rows(case)
    inputs = processor(prompts, pictures, raw=True, image_tokens=count)
    assert {*inputs.image_tokens} == {count}
    rows = [
        reference.row(prompt, images, model.config)
        for prompt, images in zip(prompts, pictures, strict=True)
    ]
    logits = [reference.logits(*row) for row in rows]
    tokens = [reference.tokens(*row, LENGTH) for row in rows]
    singles = [
        processor(prompt, images, raw=True, image_tokens=count)
        for prompt, images in zip(prompts, pictures, strict=True)
    ]
    for machine in MACHINES:
        with as_on(machine):
            for row, expected in zip(model(**inputs), logits, strict=True):
                ours = np.array(row)[-len(expected) :]
                assert np.abs(ours - expected).max() < TOLERANCE
            reuse = PromptCache(model)
            for one, expected in zip(singles, tokens, strict=True):
                for options in ({"prefill_step": 3}, {"prompt_cache": reuse}) * 2:
                    parts = list(
                        stream_generate(model, processor, one, max_tokens=LENGTH, **options)
                    )
                    assert [part.token for part in parts] == expected
            generator = BatchGenerator(model, processor, batch_size=2)
            answers = {generator.insert(one, Options(max_tokens=LENGTH)): [] for one in singles}
            for uid, part in run(generator):
                answers[uid].append(part.token)
            assert [*answers.values()] == tokens


def test_the_first_is_farthest_from_its_nearest_and_of_equals_the_first_is_taken():
    points = np.array([0, 0.125, 5, 5, 9, 9.125, 20])
    distances = np.abs(points[:, None] - points).astype(np.float32)
    assert most_diverse(distances, 7).tolist() == [6, 0, 5, 2, 1, 4, 3]
    assert most_diverse(np.zeros((4, 4), np.float32), 3).tolist() == [0, 1, 2]


def test_features_without_a_direction_are_chosen_once_each(loaded):
    image = show(mx.zeros((16, 8)), 5, None, loaded[0].config)
    assert image.kept.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("count", "sizes", "shares"),
    [
        (640, [576] * 5, [128] * 5),
        (7, [16, 20, 4], [3, 3, 1]),
        (1, [5, 5], [1, 0]),
        (10, [3, 3, 4], [3, 3, 4]),
    ],
)
def test_a_count_is_spread_by_area(count, sizes, shares):
    assert spread(count, sizes) == shares


@pytest.mark.parametrize(
    "layout",
    [
        {"mm_patch_merge_type": "flat"},
        {"mm_patch_merge_type": "spatial"},
        {},
        {"model_type": "llava_onevision", "vision_aspect_ratio": "anyres_max_1"},  # scaled down
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(50, 41), (20, 64), (90, 30), (28, 28)])
def test_areas_are_the_tiles_that_features_come_from(layout, size, loaded_next):
    config = replace(loaded_next[0].config, **layout)
    tiles = 1 + num_tiles(size, config)
    marked = mx.repeat(mx.eye(tiles)[:, None], config.tokens_per_tile, axis=1)
    newline = -mx.ones(tiles) if config.has_newline else None
    features = np.array(lay_out(marked, newline, [size], config)[0])
    areas = areas_of(len(features), size, config)
    assert sorted(np.concatenate(areas).tolist()) == [*range(len(features))]
    assert len(areas) == tiles
    for tile, area in enumerate(areas):
        assert (features[area, tile] == features[area].max(axis=1)).all()
