"""`python -m evoprune` is `evoprune`."""

import sys

from evoprune.cli import main

if __name__ == "__main__":
    sys.exit(main())
