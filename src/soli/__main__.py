"""`python -m soli` is the same as `soli`."""

import sys

from soli.cli import main

if __name__ == "__main__":
    sys.exit(main())
