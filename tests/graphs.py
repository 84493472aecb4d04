"""What Metal would launch: the graphs of arrays, in which MLX's fused operations are one node each.

Traced on a CPU, where MLX takes them apart.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from tests.conftest import as_on

FUSED = ("rms_norm", "layer_norm", "rope", "scaled_dot_product_attention")
#: What Metal does without a kernel. A reshaping copies where an array is not in order; what
#: attention gives is written in the order in which the next layer reads it.
VIEWS = {
    *("Broadcast", "BroadcastAxes", "ExpandDims", "Squeeze", "Transpose"),
    *("Flatten", "Unflatten", "Reshape", "Slice", "Split", "StopGradient", "View"),
}


@contextmanager
def on_metal(*models: nn.Module) -> Iterator[None]:
    """Computes as on a Mac, and makes the fused operations of some models one node.

    Numbers are wrong meanwhile; shapes and dtypes are right.
    """
    with as_on("mac"), pytest.MonkeyPatch.context() as patch:
        nodes = {getattr(mx.fast, name): _one_node(getattr(mx.fast, name)) for name in FUSED}
        for name, node in zip(FUSED, nodes.values(), strict=True):
            patch.setattr(mx.fast, name, node)
        for module in (module for model in models for module in model.modules()):
            for name, value in list(vars(module).items()):
                if callable(value) and value in nodes:
                    patch.setattr(module, name, nodes[value])
        mx.eval([model.state for model in models])
        yield


def _one_node(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """A function of the same shape and dtype that is the node ``Depends``."""

    def node(x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        arrays = [a for a in (x, *args, *kwargs.values()) if isinstance(a, mx.array)]
        result = function(x, *args, **kwargs)
        assert result.shape == x.shape
        return mx.depends(x, arrays).astype(result.dtype)

    return node


def launches(*outputs: mx.array) -> Counter[str]:
    """The kernels behind arrays that are not evaluated; a whole takes a copy of each part."""
    dot = io.StringIO()
    mx.export_to_dot(dot, *outputs)
    text = dot.getvalue()
    inputs = Counter(re.findall(r'"\w+" -> (\d+)', text))
    count: Counter[str] = Counter()
    for node, name in re.findall(r'(\d+) \[label ="(\w+)"', text):
        if name not in VIEWS:
            count[name] += inputs[node] if name == "Concatenate" else 1
    return count


def dtypes(function: Callable[..., Any], *arrays: mx.array) -> dict[str, set[mx.Dtype]]:
    """What each operation behind a function's results gives; raises where it reads a value."""
    found: dict[str, set[mx.Dtype]] = {}

    def collect(node: dict[str, Any]) -> None:
        if node["type"] == "primitive":
            found.setdefault(node["name"], set()).update(dtype for *_, dtype in node["outputs"])

    mx.export_function(collect, function, *arrays)
    return found
