"""``python scripts/convert_weights.py ...`` is ``python -m mlx_llava.convert ...``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from mlx_llava.convert import main

sys.exit(main())
