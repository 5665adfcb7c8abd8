"""`python -m lrpfx` is the command `lrpfx`."""

import sys

from lrpfx.command import main

if __name__ == "__main__":
    sys.exit(main())
