"""the demo environment: everything the pipeline needs, small enough for a bare machine."""

import sys
from pathlib import Path

# The rooms of scripts/ are imported as its programs import them, wherever `python -m demo` is started with nothing installed.
sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
