"""What the command line does: `python -m testbed EXPERIMENT.yaml`, or one of the subcommands in `testbed/commands/`."""

import errno
import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from backends.registry import did_you_mean
from testbed.config.yaml_source import ConfigError, experiments
from testbed.problems import ProblemError
from testbed.processes.shield import stoppable
from testbed.records import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, CannotWrite

CANNOT_WRITE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
)
COMMANDS = (  # all else is an experiment to run
    "calibrate",
    "compare",
    "conformance",
    "doctor",
    "frontier",
    "list",
    "precision",
    "report",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Raises:
        KeyboardInterrupt: It was interrupted where nothing had to be kept.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without "×" gets its code, not an exception
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    subcommand = bool(arguments) and arguments[0] in COMMANDS
    command = importlib.import_module(f"testbed.commands.{arguments[0] if subcommand else 'run'}")
    try:
        _refuse_what_no_record_can_hold(arguments)
        if not subcommand:
            _refuse_misspelt(arguments[:1])
        with stoppable():
            code: int = command.main(arguments[1:] if subcommand else arguments)
        sys.stdout.flush()
        return code
    except (ConfigError, ProblemError) as error:
        print(f"testbed: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except CannotWrite as error:
        print(f"testbed: error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except BrokenPipeError:  # whoever read the output has enough, as in `… list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        return EXIT_INTERRUPTED
    except (
        Exception
    ) as error:  # a fault of the program or of a plug-in; Python's own exit code 1 would say "a backend is wrong"
        if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
            print(f"testbed: error: {error.filename or 'the output'}: {error.strerror}", file=sys.stderr)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:
            traceback.print_exc()
        return EXIT_FAILED


def _refuse_what_no_record_can_hold(arguments: Sequence[str]) -> None:
    """Refuse a name with a byte that is not UTF-8, as files may have; records are UTF-8, and keep it."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            shown = argument.encode(errors="surrogateescape").decode(errors="backslashreplace")
            raise ConfigError(
                f"{shown}: has a byte that is not UTF-8; records hold names in UTF-8, rename it"
            ) from None


def _refuse_misspelt(first: Sequence[str]) -> None:
    """Refuse a word that is an experiment's name or almost a subcommand; it would be taken for an experiment's file."""
    for word in first:
        there = [] if Path(word).suffix or Path(word).exists() else experiments(word)
        if there:
            raise ConfigError(f"{word}: no such file or command; did you mean {' or '.join(map(str, there))}?")
        meant = did_you_mean(word, COMMANDS)
        if meant and not Path(word).suffix and not Path(word).exists():
            raise ConfigError(
                f"unknown command '{word}'{meant}; available: {', '.join(COMMANDS)}, or an EXPERIMENT.yaml"
            )
