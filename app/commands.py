"""What the commands with a parser of their own share: what a user can mend is one line and the exit code 1."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence


def run_command(
    command: Callable[[argparse.Namespace], int], parser: argparse.ArgumentParser, argv: Sequence[str]
) -> int:
    """Parses `argv` and calls `command`; returns its exit code, 1 after an error, 130 after Ctrl-C."""
    options = parser.parse_intermixed_args(list(argv))
    try:
        return command(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
