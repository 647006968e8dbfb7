"""An experiment: the typed, frozen form of its YAML file. Nothing past this file sees a dict from YAML."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from backends import available, reference
from backends.base import BACKENDS, QUANTITIES, Backend
from backends.registry import (
    BadOption,
    Registry,
    UnknownName,
    check_options,
    did_you_mean,
    explain,
    options_of,
    unknown,
)
from testbed.agreement import RULES
from testbed.problems import DATA, LOSSES, MODELS
from testbed.records import STATUSES, with_options
from testbed.yaml_source import ConfigError, KeyPath, Source, read, write

Dtype = Literal["float32", "float64", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
HERE = "in this experiment"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Choice(_Frozen):
    """A name, or {name: {option: value, …}}."""

    name: str
    options: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _read(cls, found: Any) -> Any:  # noqa: ANN401  anything may stand in a YAML file
        if isinstance(found, str):
            return {"name": found}
        if isinstance(found, dict) and len(found) == 1:
            name, options = next(iter(found.items()))
            if options is None or isinstance(options, dict):
                return {"name": name, "options": options or {}}
        raise ValueError("should be a name, or {name: {option: value}}")

    def plain(self) -> str | dict[str, Any]:
        """Return the choice as it is written in YAML."""
        return {self.name: self.options} if self.options else self.name

    def __str__(self) -> str:
        """Return the choice as it is shown: `opacus(mode=ew)`."""
        return with_options(self.name, self.options)

    @classmethod
    def of(cls, name: str, **options: Any) -> Self:  # noqa: ANN401  options are as many types as there are
        """Return the choice of a name with options."""
        return cls.model_validate({name: options})


class Timing(_Frozen):
    """How long to measure."""

    rounds: Annotated[int, Field(ge=2)] = Field(30, description="Rounds at most; each times every backend once.")
    max_s: Annotated[float, Field(gt=0)] = Field(20.0, description="Seconds for the rounds of a quantity; two are run.")
    warmup: Annotated[int, Field(ge=0)] = Field(1, description="Untimed calls after the first one.")
    precision: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.02, description="No more rounds once every ratio's interval is ± this share of it; 0: all rounds."
    )


class Limits(_Frozen):
    """What each backend's process may take; see `testbed.child`."""

    timeout_s: Annotated[float, Field(gt=0)] = Field(600.0, description="Seconds for a step of a cell.")
    memory_gb: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="GB of host memory a process may take (Linux); on a CPU nine tenths of what is free if left out.",
    )


class Experiment(_Frozen):
    """One experiment, as its YAML file says it."""

    description: str = Field("", description="What it is for; printed above the table.")
    model: Choice = Field(description="The model, by name; `python -m testbed list models`.")
    data: Choice = Field(description="The data, by name; `python -m testbed list data`.")
    loss: Choice = Field(description="The loss, by name; `python -m testbed list losses`.")
    batch_size: Annotated[int, Field(gt=0)] = Field(64, description="Samples in the batch, N.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="Seeds data, weights and the order of rounds.")
    train_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="Steps of Adam before measuring; random weights hide problems."
    )
    dtype: Dtype = Field("float32", description="Of weights and inputs while measuring.")
    device: Device = Field("auto", description="`auto` takes CUDA where there is one and says so.")
    tf32: bool = Field(False, description="Let CUDA round float32 products to TF32.")
    quantities: Annotated[tuple[Choice, ...], Field(min_length=1)] = Field(
        (Choice.of("grads"),), description="What to compute: " + ", ".join(QUANTITIES) + "."
    )
    backends: Annotated[tuple[Choice, ...], Field(min_length=1)] | None = Field(
        None, description="Which backends, with options; all of them if left out."
    )
    baseline: str | None = Field(None, description="The backend that times are divided by; the reference if left out.")
    agreement: Choice = Field(Choice.of("calibrated"), description="The rule: " + ", ".join(RULES) + ".")
    timing: Timing = Field(Timing(), description="How long to measure.")
    limits: Limits = Field(Limits(), description="What a backend's process may take.")
    expect: dict[str, str] = Field(
        {}, description="Backend → status that is as expected, such as `backpack: unsupported`; sets the exit code."
    )

    def resolved_backends(self) -> tuple[Choice, ...]:
        """Return the backends to run: those named, or all."""
        return self.backends or tuple(Choice.of(name) for name in available())

    def resolved_baseline(self) -> str | None:
        """Return the name of the backend that times are divided by; None where it is not run."""
        baseline = self.baseline or reference()
        return baseline if baseline in {choice.name for choice in self.resolved_backends()} else None

    def to_yaml(self) -> str:
        """Return the experiment as YAML, defaults filled in; reading it back gives the same experiment."""

        def plain(value: Any) -> Any:  # noqa: ANN401  recursion over plain data
            if isinstance(value, Choice):
                return plain(value.plain())
            if isinstance(value, BaseModel):
                return {name: plain(getattr(value, name)) for name in type(value).model_fields}
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            return [plain(v) for v in value] if isinstance(value, tuple | list) else value

        resolved = self.model_copy(
            update={"backends": self.resolved_backends(), "baseline": self.resolved_baseline()},
        )
        return write(plain(resolved))


def load_experiment(file: str | Path, assignments: Sequence[str] = (), only: Sequence[str] = ()) -> Experiment:
    """Read an experiment.

    Args:
        file: The YAML file.
        assignments: `KEY=VALUE` strings that replace parts of it.
        only: Names of the backends to keep; all if empty.

    Raises:
        ConfigError: One line: place, what, found, allowed.
    """
    source = read(file)
    if not isinstance(source.data, dict):
        expected = "expected keys such as 'model', 'data' and 'loss'"
        raise ConfigError(f"{source.place(())}: {expected}, found {_kind(source.data)}")
    for assignment in assignments:
        source.replace(assignment)
    try:
        experiment = Experiment.model_validate(_tuples(source.data))
    except ValidationError as error:
        raise ConfigError(_first_problem(error, source)) from None
    _check_names(experiment, source)
    return _keep(experiment, only) if only else experiment


def resolve_device(device: str) -> torch.device:
    """Return the device to run on.

    Raises:
        ConfigError: CUDA was asked for and there is none; it never falls back.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda': PyTorch finds no CUDA device here; use device 'cpu' or 'auto'")
    return torch.device(device)


def _keep(experiment: Experiment, only: Sequence[str]) -> Experiment:
    chosen = experiment.resolved_backends()
    names = {c.name for c in chosen}
    for name in only:
        if name not in names:
            raise ConfigError(f"--only: {unknown('backend', name, names)} {HERE}")
    kept = tuple(c for c in chosen if c.name in only)
    expect = {b: status for b, status in experiment.expect.items() if b in {n for c in kept for n in (c.name, str(c))}}
    baseline = experiment.baseline if experiment.baseline in only else None
    return experiment.model_copy(update={"backends": kept, "baseline": baseline, "expect": expect})


def _first_problem(error: ValidationError, source: Source) -> str:
    """Return the first of pydantic's errors as one line with its place; a key that is misspelt is not missing."""
    problems: Any = error.errors()
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    path: KeyPath = tuple(problem["loc"])
    if problem["type"] == "extra_forbidden":
        parts: dict[str, type[BaseModel]] = {"timing": Timing, "limits": Limits}
        owner = parts.get(str(path[0]), Experiment)
        known = list(owner.model_fields)
        asked = f"unknown key '{path[-1]}'{did_you_mean(path[-1], known)}; allowed: {', '.join(known)}"
        return f"{source.place(path, key=True)}: {asked}"
    hint = f": {Experiment.model_fields[str(path[0])].description}" if problem["type"] == "missing" else ""
    return f"{source.place(path)}: {explain(problem)}{hint}"


def _check_names(experiment: Experiment, source: Source) -> None:
    """Check every name and option against the registries, before anything is built."""
    available()  # discovery fills the registry
    _check(MODELS, experiment.model, ("model",), source)
    _check(DATA, experiment.data, ("data",), source)
    _check(LOSSES, experiment.loss, ("loss",), source)
    _check(RULES, experiment.agreement, ("agreement",), source)
    labels: set[str] = set()
    for i, choice in enumerate(experiment.backends or ()):
        _check(BACKENDS, choice, ("backends", i), source)
        if str(choice) in labels:
            raise ConfigError(f"{source.place(('backends', i))}: backend '{choice}' is listed twice")
        labels.add(str(choice))
    for i, choice in enumerate(experiment.quantities):
        place = source.place(("quantities", i))
        if choice.name not in QUANTITIES:
            raise ConfigError(f"{place}: {unknown('quantity', choice.name, QUANTITIES)}")
        _refuse_bad_option("quantity", choice, getattr(Backend, choice.name), ("quantities", i), source)
        if choice in experiment.quantities[:i]:
            raise ConfigError(f"{place}: quantity '{choice}' is listed twice")
    names = [c.name for c in experiment.resolved_backends()]
    if experiment.baseline and experiment.baseline not in names:
        raise ConfigError(f"{source.place(('baseline',))}: {unknown('baseline', experiment.baseline, names)} {HERE}")
    for name, status in experiment.expect.items():
        if name not in {*names, *labels}:
            raise ConfigError(f"{source.place(('expect', name), key=True)}: {unknown('backend', name, names)} {HERE}")
        if status not in STATUSES:
            raise ConfigError(f"{source.place(('expect', name))}: {unknown('status', status, STATUSES)}")


def _check(registry: Registry[Any], choice: Choice, path: KeyPath, source: Source) -> None:
    try:
        thing = registry[choice.name]
    except UnknownName as error:
        raise ConfigError(f"{source.place(path)}: {error}") from None
    _refuse_bad_option(registry.kind, choice, thing, path, source)


def _refuse_bad_option(kind: str, choice: Choice, thing: Any, path: KeyPath, source: Source) -> None:  # noqa: ANN401
    try:
        check_options(kind, choice.name, thing, choice.options)
    except BadOption as error:
        unknown_option = error.path[0] not in options_of(thing)
        raise ConfigError(f"{source.place((*path, choice.name, *error.path), key=unknown_option)}: {error}") from None


def _tuples(value: Any) -> Any:  # noqa: ANN401  recursion over YAML data
    """Return YAML data with lists as tuples: an experiment is frozen."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _kind(value: object) -> str:
    return {type(None): "nothing", list: "a list", str: "text", bool: "a truth value"}.get(type(value), "a number")
