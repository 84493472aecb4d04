"""Writes docs/certificate.md: how the named checkpoints of tests/published are read.

python scripts/make_certificate.py      # needs pip install '.[test]'; half a minute
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "certificate.md"

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from tests.certificate import page

    PAGE.write_text(page(), encoding="utf-8")
