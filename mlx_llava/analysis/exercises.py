"""What a notebook says to the answer of an exercise."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt


def check(
    answer: Any, right: npt.ArrayLike, hint: str, near: float = 1e-5, wanted: str = "A number"
) -> None:
    """Prints whether an answer is right; numbers may be texts as well, like "0.67" or "2/3".

    Args:
        answer: None as long as there is none.
        right: The number that is right, or rows of them.
        hint: What to mind, said to other numbers.
        near (float): How far from it is right as well.
        wanted (str): What to give, said to what is no such thing.
    """
    if answer is None:
        print("Your turn.")
        return
    try:
        given = np.vectorize(_number, otypes=[float])(np.asarray(answer, object))
    except (TypeError, ValueError, ArithmeticError):
        given = np.array([])
    if given.shape != np.shape(right):
        print(f"{wanted}, please.")
    elif np.allclose(given, right, rtol=0, atol=near):
        print("Right.")
    else:
        print(f"Not yet: {hint}")


def _number(given: Any) -> float:
    return float(Fraction(given.replace("_", "")) if isinstance(given, str) else given)
