"""Makes `tests/support` importable and registers the hypothesis profiles."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.profiles import register

register()
