"""An answer that goes round in circles is known as soon as it does, and no other is."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_llava.generation.stops import Circles

groups = st.lists(st.integers(0, 3), min_size=1, max_size=Circles.LONGEST)


def has_come_round(tokens: list[int], times: int) -> bool:
    """By the definition: some group fills the end that often."""
    return any(
        len(tokens) >= times * n and tokens[-times * n :] == tokens[-n:] * times
        for n in range(1, Circles.LONGEST + 1)
    )


@given(before=st.lists(st.integers(0, 3), max_size=20), group=groups, times=st.integers(2, 6))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_circles_are_found_when_they_close(before, group, times):
    circles, never = Circles(times), Circles(None)
    tokens: list[int] = []
    for token in before + group * times:
        tokens.append(token)
        circles.add(token)
        never.add(token)
        assert circles.found == any(
            has_come_round(tokens[:end], times) for end in range(1, len(tokens) + 1)
        )
    assert circles.found
    assert not never.found
