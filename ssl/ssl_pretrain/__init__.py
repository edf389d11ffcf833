"""ssl-pretrain: self-supervised pretraining of vision encoders. Importing this package imports nothing heavy."""

import sys

__version__ = "0.1.0"

if sys.platform == "win32":
    print("ssl-pretrain does not run on Windows: use Linux, or WSL 2 on Windows", file=sys.stderr)
    raise SystemExit(2)
