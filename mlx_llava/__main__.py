"""``python -m mlx_llava COMMAND``."""

import sys

from mlx_llava.cli import main

sys.exit(main())
