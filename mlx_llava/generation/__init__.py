"""Inputs -> text."""

import mlx_llava.model  # noqa: F401 - its BLAS comes before mlx.core
