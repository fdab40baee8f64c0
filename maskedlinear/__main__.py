"""``python -m maskedlinear``: the command line without the script."""

import sys

from maskedlinear.cli import main

if __name__ == "__main__":
    sys.exit(main())
