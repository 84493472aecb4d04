"""What a model did, how well, and how fast."""

import mlx_llava.model  # noqa: F401 - its BLAS comes before mlx.core
