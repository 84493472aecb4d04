"""Arrays -> arrays: the network, and what it runs on."""

from mlx_llava.model import blas  # noqa: F401 - before mlx.core
