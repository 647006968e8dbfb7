"""Backends for per-sample gradients, found by themselves: a sibling file, an entry point, or `load_plugin(FILE)`.

from backends import available, get_backend
grads = get_backend("vmap", chunk_size=16).grads(model, loss_fn)
g = grads(inputs, targets)            # {parameter name: [N, *shape]}
"""

import importlib
import importlib.util
import pkgutil
import sys
import zlib
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from backends.base import BACKENDS, Backend
from backends.execution import executed
from backends.registry import options_of

ENTRY_POINTS = "testbed.backends"

__all__ = ["available", "backend_class", "get_backend", "load_plugin", "reference", "variants"]


@cache
def _discover() -> None:
    """Import every sibling file, then every installed entry point; each registers what it holds."""
    for sibling in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{sibling.name}")
    for entry in entry_points(group=ENTRY_POINTS):
        entry.load()


def available() -> list[str]:
    """Return the names of all backends, those whose library is not installed included."""
    _discover()
    return list(BACKENDS)


def backend_class(name: str) -> type[Backend]:
    """Return the class registered under `name`; an unknown name raises `UnknownName`, which lists the known ones."""
    _discover()
    return BACKENDS[name]


def get_backend(name: str, **options: Any) -> Backend:  # noqa: ANN401  options are as many types as backends have
    """Return a backend with its options checked.

    Raises:
        UnknownName: No backend has that name.
        BadOption: It has no such option, or the option has the wrong type.
    """
    cls = backend_class(name)
    return executed(cls(**BACKENDS.check(name, options)))


def variants(quantity: str | None = None) -> list[tuple[str, dict[str, Any]]]:
    """Return every backend with its defaults, and with each other value of its options that are choices.

    Args:
        quantity: Only backends that compute it; all if None.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    for name in available():
        if quantity not in (None, *BACKENDS[name].quantities):
            continue
        found.append((name, {}))
        for option, parameter in options_of(BACKENDS[name]).items():
            values = get_args(parameter.annotation) if get_origin(parameter.annotation) is Literal else ()
            found += [(name, {option: value}) for value in values if value != parameter.default]
    return found


def reference() -> str:
    """Return the name of the backend that the others are compared with."""
    return next(name for name in available() if BACKENDS[name].reference)


def load_plugin(file: str | Path) -> None:
    """Run a Python file that registers backends, models, data or losses by decorator.

    Raises:
        FileNotFoundError: There is no such file. Errors of the file itself escape as they are.
    """
    path = Path(file).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"no plugin file {file}")
    _discover()  # so that a name taken by a sibling is reported against the plug-in
    name = f"testbed_plugin_{path.stem}_{zlib.crc32(bytes(path)):08x}"  # two files of one name are two modules
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file (*.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look their module up here
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
