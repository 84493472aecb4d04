"""Rows that join, leave and go on together give the numbers that each gives alone."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_llava.analysis.random_model import random_config
from mlx_llava.model.batch_cache import BatchCache, RaggedCache, SlotCache, make_batch_cache
from mlx_llava.model.cache import Cache, KVCache, make_cache, nbytes, set_positions
from mlx_llava.model.llama import LanguageModel
from mlx_llava.model.positions import Part, Positions

CONFIG = replace(random_config("tiny", 3).text_config, vocab_size=97)
FORMS = pytest.mark.parametrize("form", [RaggedCache, SlotCache])


def decoder(**text) -> LanguageModel:
    return LanguageModel(replace(CONFIG, **text))


class Rows:
    """The ids of rows beside a cache of them, to which each is compared with all of its ids."""

    def __init__(self, model: LanguageModel, batch: BatchCache, seed: int) -> None:
        self.model, self.batch = model, batch
        self.random = np.random.default_rng(seed)
        self.ids: list[list[int]] = []
        self.positions: list[Positions] = []

    def draw(self, count: int) -> list[int]:
        return self.random.integers(0, CONFIG.vocab_size, count).tolist()

    def join(self, length: int, skipped: int = 0) -> None:
        """A row whose first token is all that is left of an image of some tokens more."""
        cache = self.model.make_cache()
        part = Part(0, np.zeros(1, np.int32), 1 + skipped)
        self.positions.append(Positions((part,) if skipped else ()))
        set_positions(cache, self.positions[-1])
        self.ids.append(self.draw(length))
        self.model(mx.array([self.ids[-1]]), cache=cache)
        self.batch.join(cache)

    def leave(self, row: int) -> None:
        self.assert_stored(row)
        self.batch.leave(row)
        for rows in (self.ids, self.positions):
            rows[row] = rows[-1]
            rows.pop()

    def step(self, counts: list[int]) -> None:
        new = [self.draw(count) for count in counts]
        ids = mx.array([token for row in new for token in row])[:, None]
        logits = mx.split(self.model(ids, cache=self.batch.step(counts)), np.cumsum(counts)[:-1])
        for row, one in enumerate(new):
            self.ids[row] += one
            alone = self.alone(row)[0, -len(one) :]
            assert mx.abs(logits[row][:, 0] - alone).max() < 3e-5

    def alone(self, row: int, cache: Cache | None = None) -> mx.array:
        ids = self.ids[row]
        positions = self.positions[row].jumping(len(ids))
        return self.model(mx.array([ids]), cache=cache, positions=positions)

    def assert_stored(self, row: int) -> None:
        """What a row would leave behind is what reading its ids stores."""
        cache = self.model.make_cache()
        self.alone(row, cache)
        for ours, theirs in zip(self.batch.extract(row), cache, strict=True):
            assert ours.offset == theirs.offset
            for a, b in zip(ours.state, theirs.state, strict=True):
                assert mx.allclose(a, b, atol=3e-5)


@FORMS
@pytest.mark.parametrize("text", [{}, {"sliding_window": 6}, {"num_key_value_heads": 1}], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_rows_that_come_and_go_are_what_they_are_alone(form, text, seed):
    rows = Rows(decoder(**text), form(), seed)
    random = np.random.default_rng(seed)
    for _ in range(25):
        chance = random.random()
        if not rows.ids or (chance < 0.3 and len(rows.ids) < 6):
            rows.join(int(random.choice([1, 7, 40, 255])), int(random.choice([0, 0, 4])))
        elif chance < 0.45:
            rows.leave(int(random.integers(len(rows.ids))))
        elif chance < 0.6:
            rows.step(random.integers(1, 5, len(rows.ids)).tolist())
        else:
            rows.step([1] * len(rows.ids))
    for row in range(len(rows.ids)):
        rows.assert_stored(row)


def test_overflow_in_one_row_is_not_seen_by_the_next_in_its_slot():
    batch, model = SlotCache(), decoder()
    rows = Rows(model, batch, 0)
    rows.join(20)
    cache = model.make_cache()
    model(mx.array([[5] * 300]), cache=cache)
    for layer in cache:
        layer.values = layer.values + mx.inf
    batch.join(cache)
    batch.leave(1)
    rows.join(4)
    rows.step([1, 1])
    rows.leave(0)
    rows.step([1])


def test_a_step_and_a_join_write_in_place_and_what_leaves_is_a_copy():
    """Nothing holds, or copies, more than the row that it is about."""
    heads = {"num_key_value_heads": 4, "num_hidden_layers": 8}
    rows = Rows(decoder(**heads), SlotCache(), 1)
    for _ in range(8):
        rows.join(200)
    mx.eval(rows.batch.arrays)
    one = rows.batch.nbytes // 8

    def most(function, *args) -> int:
        """The memory beyond what was held before that something takes on its way."""
        mx.eval(rows.batch.arrays)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        function(*args)
        mx.eval(rows.batch.arrays)
        return mx.get_peak_memory() - before

    rows.batch.leave(7)
    cache = rows.model.make_cache()
    rows.model(mx.array([rows.draw(200)]), cache=cache)
    mx.eval([layer.state for layer in cache])
    assert most(rows.batch.join, cache) < 2 * one
    assert most(lambda: rows.batch.leave(0)) < 2 * one
    ids = mx.zeros((7, 1), mx.int32)
    assert most(lambda: mx.eval(rows.model(ids, cache=rows.batch.step([1] * 7)))) < one
    del cache
    before = mx.get_active_memory() - rows.batch.nbytes
    kept = rows.batch.extract(0)
    mx.eval([layer.state for layer in kept])
    rows.batch = SlotCache()
    assert mx.get_active_memory() - before < 1.1 * nbytes(kept)


@FORMS
def test_memory_is_what_was_said(form):
    rows = Rows(decoder(), form(), 2)
    for length in (30, 300, 7):
        rows.join(length)
    mx.eval(rows.batch.nbytes)
    per_position = 2 * 4 * CONFIG.kv_heads * CONFIG.dims_per_head * CONFIG.num_hidden_layers
    assert rows.batch.nbytes == rows.batch.positions([30, 300, 7]) * per_position
    assert form().positions([30, 300, 7]) == rows.batch.positions([30, 300, 7])
    for _ in range(3):
        rows.leave(0)
    assert rows.batch.nbytes == 0


def test_the_form_follows_the_device(monkeypatch):
    monkeypatch.setattr("mlx_llava.model.batch_cache.on_cpu", lambda: True)
    assert isinstance(make_batch_cache(), RaggedCache)
    monkeypatch.setattr("mlx_llava.model.batch_cache.on_cpu", lambda: False)
    assert isinstance(make_batch_cache(), SlotCache)
    assert isinstance(make_batch_cache(kv_bits=8), RaggedCache)


def test_codes_go_on_row_by_row():
    pytest.importorskip("mlx_lm.models.cache")
    wide = replace(CONFIG, hidden_size=128, head_dim=32)
    model, batch, alone = LanguageModel(wide), make_batch_cache(8), []
    for length in (3, 9):
        caches = [make_cache(wide, kv_bits=8) for _ in range(2)]
        for cache in caches:
            model(mx.full((1, length), 5), cache=cache)
        batch.join(caches[0])
        alone.append(model(mx.array([[7, 8, 9][: length // 3]]), cache=caches[1])[0])
    together = model(mx.array([[7], [7], [8], [9]]), cache=batch.step([1, 3]))
    assert mx.allclose(together[:, 0], mx.concatenate(alone), atol=3e-5)
    assert not isinstance(batch.extract(0)[0], KVCache)
