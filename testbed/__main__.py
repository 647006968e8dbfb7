"""`python -m testbed …`: the command line, from its first moment on."""

import sys
from collections.abc import Sequence

from testbed.streams import drop_what_stderr_cannot_take, open_closed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    open_closed()
    drop_what_stderr_cannot_take()
    try:
        from testbed import command_line  # PyTorch takes a second or two, in which somebody may press Ctrl-C

        return command_line.main(arguments)
    except KeyboardInterrupt:
        print("testbed: interrupted", file=sys.stderr)
        return 130  # as `EXIT_INTERRUPTED`, which may not be there yet


if __name__ == "__main__":
    sys.exit(main())
