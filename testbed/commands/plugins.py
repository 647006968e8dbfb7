"""`--plugin FILE`, for every command."""

import argparse
import traceback
from collections.abc import Sequence
from pathlib import Path

from backends import load_plugin
from backends.base import first_line
from testbed.config.yaml_source import ConfigError
from testbed.problems.factories import CannotRegister


def add_plugin(parser: argparse.ArgumentParser) -> None:
    """Add the option to a parser."""
    parser.add_argument(
        "--plugin",
        metavar="FILE",
        action="append",
        default=[],
        help="a Python file that registers backends, models, data or losses (repeatable)",
    )


def load_plugins(files: Sequence[str]) -> None:
    """Load the files.

    Raises:
        ConfigError: One line: the file, the line in it, the error.
    """
    for file in files:
        try:
            load_plugin(file)
        except (Exception, SystemExit) as error:
            line = _line_in(file, error)
            place = f"{file}:{line}" if line else file
            kind = "" if isinstance(error, CannotRegister) else f"{type(error).__name__}: "
            raise ConfigError(f"{place}: {kind}{first_line(error)}") from None


def _line_in(file: str, error: BaseException) -> int | None:
    """Return the line of a plug-in in which an error arose."""
    plugin = Path(file).resolve()
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename) == plugin:
        return error.lineno
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == plugin]
    return frames[-1].lineno if frames else None
