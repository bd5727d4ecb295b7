"""`python -m evoprune` is `evoprune`. Signals are seen to before anything that takes time to import."""

import sys

from evoprune.search.signals import STOPPED, interrupt_on_signals


def main() -> int:
    """The command line as a process; its exit code."""
    try:
        with interrupt_on_signals():
            from evoprune import cli

            return cli.main()
    except KeyboardInterrupt:
        sys.stderr.write(f"interrupted: {STOPPED}\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
