"""What several commands take: a folder, names with commas between them. An empty one is a variable that is not set."""

import argparse
from pathlib import Path


def directory(text: str) -> Path:
    """Return the folder that an option names.

    Raises:
        argparse.ArgumentTypeError: It names none; Python would take the current one.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError(f"should name a folder, found {text!r}; for the current one, give .")
    return Path(text)


def names(text: str) -> list[str]:
    """Return the names that an option lists, `a,b`.

    Raises:
        argparse.ArgumentTypeError: It lists none; who wants all leaves the option out.
    """
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"should be names with commas between them, found {text!r}")
    return found
