"""`python -m testbed list`: what there is."""

import argparse
import inspect
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backends import available
from backends.base import BACKENDS, Backend, Unavailable
from backends.registry import Registry, options_of
from testbed.commands.plugins import add_plugin, load_plugins
from testbed.config.load import load_experiment
from testbed.config.yaml_source import ConfigError
from testbed.problems import DATA, LOSSES, MODELS
from testbed.records import EXIT_OK


def main(arguments: Sequence[str]) -> int:
    """List what there is, each with its first line of documentation and its options."""
    parser = argparse.ArgumentParser(prog="python -m testbed list", description="List what there is.")
    kinds = ("backends", "models", "data", "losses", "experiments")
    parser.add_argument("kind", nargs="?", choices=kinds, help="only this (default: all)")
    add_plugin(parser)
    options = parser.parse_args(arguments)
    load_plugins(options.plugin)
    available()
    registries: dict[str, Registry[Any]] = {"backends": BACKENDS, "models": MODELS, "data": DATA, "losses": LOSSES}
    for kind in [options.kind] if options.kind else kinds:
        print(kind)
        lines = _experiments() if kind == "experiments" else _entries(registries[kind])
        for name, about in lines:
            print(_wrapped(f"  {name:<24} ", about))
    return EXIT_OK


def _wrapped(name: str, about: str) -> str:
    """Return an entry in lines that fit the terminal; one line where a program reads it."""
    if not (sys.stdout.isatty() or os.environ.get("COLUMNS")):
        return f"{name}{about}"
    width = shutil.get_terminal_size().columns
    hanging = " " * (len(name) if len(name) < width // 2 else 6)
    rules: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(about, width, initial_indent=name, subsequent_indent=hanging, **rules)


def _entries(registry: Registry[Any]) -> list[tuple[str, str]]:
    found = []
    for name in registry:
        thing = registry[name]
        about = next(iter((inspect.getdoc(thing) or "").splitlines()), "")
        common = options_of(Backend) if registry is BACKENDS else {}
        if options := ", ".join(option for option in options_of(thing) if option not in common):
            about += f" (options: {options})"
        if registry is BACKENDS:
            try:
                thing.load()
            except Unavailable as error:
                about = f"unavailable: {error}"
        found.append((name, about))
    if registry is BACKENDS:
        found.append(("(every backend)", f"options: {', '.join(options_of(Backend))}"))
    return found


def _experiments() -> list[tuple[str, str]]:
    here = Path("experiments")
    folder = here if here.is_dir() else Path(__file__).parent.parent.parent / "experiments"
    return [(str(f), _description(f)) for f in sorted(folder.glob("**/*.yaml")) if "results" not in f.parts]


def _description(file: Path) -> str:
    try:
        return load_experiment(file).description.strip()
    except ConfigError as error:
        return f"cannot be run: {error}"
