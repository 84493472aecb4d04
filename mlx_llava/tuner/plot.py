"""The picture of a run: its losses over its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def plot_losses(reports: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draws training and validation loss on a logarithmic scale.

    Args:
        reports (list of dict): What metrics.jsonl holds.
        path (Path): The PNG to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (
        ("loss", "training", {"linewidth": 1.2}),
        ("valid_loss", "validation", {"marker": "o", "linestyle": "--"}),
    ):
        points = [(report["step"], report[key]) for report in reports if key in report]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
