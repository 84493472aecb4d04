"""``python -m mlx_llava COMMAND``."""

import sys

from mlx_llava.cli import main

if __name__ == "__main__":
    sys.exit(main())
