"""The demo environment: everything that the pipeline needs, small enough for a machine without a GPU."""

import sys
from pathlib import Path

# The packages in scripts/ are imported as its programs import them, without being installed and from any current folder.
sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
