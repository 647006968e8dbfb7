"""`size` names an entry of `sizes`, whose keys stand in place of the experiment's own."""

from collections.abc import Collection, Sequence
from typing import Any

from backends.registry import did_you_mean, unknown
from testbed.config.yaml_source import ConfigError, KeyPath, Source

OWN = ("size", "sizes", "published", "description")
"""Keys that no size has: they are about the experiment as a whole."""


def of_size(assignment: str) -> bool:
    """Return whether `KEY=VALUE` says which size is meant, or what a size is; such come before all others."""
    return assignment.partition("=")[0].strip().split(".")[0] in ("size", "sizes")


def apply_size(source: Source, keys: Sequence[str]) -> None:
    """Put the keys of the chosen size in place of the experiment's; what is left of `sizes` is its name.

    Args:
        source: A mapping.
        keys: What an experiment may have.

    Raises:
        ConfigError: One line: place, what, found, allowed.
    """
    data = source.data
    sizes, size = data.get("sizes") or {}, data.get("size")
    if not isinstance(sizes, dict):
        raise _no_mapping(("sizes",), source)
    allowed = [key for key in keys if key not in OWN]
    for name, entry in sizes.items():
        if not isinstance(entry, dict):
            raise _no_mapping(("sizes", name), source)
        _refuse_unknown(entry, allowed, ("sizes", name), source)
    if size is None:
        return
    if not isinstance(size, str) or size not in sizes:
        raise ConfigError(f"{source.place(('size',))}: {unknown('size', str(size), sizes)} in 'sizes'")
    for key in sizes[size]:
        source.move(("sizes", size, key), (key,))
    data["sizes"] = {size: {}}


def _no_mapping(path: KeyPath, source: Source) -> ConfigError:
    wanted = "should be mappings by name, such as sizes: {small: {batch_size: 4}}"
    return ConfigError(f"{source.place(path)}: '{'.'.join(map(str, path))}': {wanted}")


def _refuse_unknown(entry: dict[str, Any], allowed: Collection[str], path: KeyPath, source: Source) -> None:
    for key in entry:
        if key not in allowed:
            place = source.place((*path, key), key=True)
            raise ConfigError(
                f"{place}: unknown key '{key}'{did_you_mean(key, allowed)}; allowed: {', '.join(allowed)}"
            )
