"""How much a server takes on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a request may take.

    Attributes:
        body_bytes: its length.
        body_seconds: how long it may take to arrive.
        images: how many pictures it may have.
        pixels: of all its pictures together.
        seconds: how long its answers may take, waiting included.
    """

    body_bytes: int = 50_000_000
    body_seconds: float = 30.0
    images: int = 16
    pixels: int = 100_000_000
    seconds: float = 600.0

    def __post_init__(self) -> None:
        """Checks that something is allowed."""
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"The limit {name} is {value}; it must be more than 0.")
