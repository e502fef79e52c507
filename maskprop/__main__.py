"""`python -m maskprop` is the command `maskprop`."""

import sys

from maskprop.cli import main

if __name__ == "__main__":
    sys.exit(main())
