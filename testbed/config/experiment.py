"""An experiment: the typed, frozen form of its YAML file; `testbed.config.load` reads it. Nothing past it sees YAML."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from backends import available, reference
from backends.base import QUANTITIES
from testbed.agreement import RULES
from testbed.config.yaml_source import ConfigError, write
from testbed.records import with_options

Dtype = Literal["float32", "float64", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]


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
    """What each backend's process may take; see `testbed.processes.child`."""

    timeout_s: Annotated[float, Field(gt=0)] = Field(600.0, description="Seconds for a step of a cell.")
    memory_gb: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="GB of its device's memory a process may take: of a GPU's on CUDA, of the host's on a CPU (Linux; "
        "nine tenths of what is free if left out).",
    )


class Published(_Frozen):
    """What a publication says of a cell of this experiment, so that a report can set ours beside it."""

    source: str = Field(description="The publication, and where in it.")
    hardware: str = Field("", description="What it was measured on.")
    what: str = Field("", description="What the publication says, in words.")
    figure: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Its time, divided by that of `relative_to`; null where it states none."
    )
    relative_to: Literal["step", "baseline"] = Field("step", description="An ordinary step, or the baseline.")
    backend: str | None = Field(None, description="The backend that computes it as the publication does, by label.")
    quantity: str | None = Field(None, description="The quantity it is about.")


class Workload(_Frozen):
    """One problem, as names and numbers."""

    model: Choice = Field(description="The model, by name; `python -m testbed list models`.")
    data: Choice = Field(description="The data, by name; `python -m testbed list data`.")
    loss: Choice = Field(description="The loss, by name; `python -m testbed list losses`.")
    batch_size: Annotated[int, Field(gt=0)] = Field(64, description="Samples in the batch, N.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="Seeds data, weights and the order of rounds.")
    train_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="Steps of Adam before measuring; random weights hide problems."
    )
    dtype: Dtype = Field("float32", description="Of weights and inputs while measuring.")
    tf32: bool = Field(False, description="Let CUDA round float32 products to TF32.")

    def __str__(self) -> str:
        """Return the problem in a line."""
        return f"{self.model}, {self.data}, {self.loss}, N={self.batch_size}, {self.dtype}"


class Combination(NamedTuple):
    """What one cell computes, on which problem and by which backend."""

    problem: Workload
    quantity: Choice
    backend: Choice

    def facts(self) -> dict[str, Any]:
        """Return what an entry of `exclude` may ask for, by key."""
        keys = {key: getattr(self.problem, key) for key in Workload.model_fields}
        return {"backend": self.backend, "quantity": self.quantity, **keys}


class Experiment(_Frozen):
    """One experiment, as its YAML file says it; sweeps are written out."""

    description: str = Field("", description="What it is for; printed above the table.")
    problems: tuple[Workload, ...] = Field(
        description="Mappings with the keys above, each for problems of their own; what they leave out stands above."
    )
    device: Device = Field("auto", description="`auto` takes CUDA where there is one and says so.")
    quantities: Annotated[tuple[Choice, ...], Field(min_length=1)] = Field(
        (Choice.of("grads"),), description="What to compute: " + ", ".join(QUANTITIES) + "."
    )
    backends: Annotated[tuple[Choice, ...], Field(min_length=1)] | None = Field(
        None, description="Which backends, with options; all of them if left out."
    )
    exclude: tuple[dict[str, Any], ...] = Field(
        (), description="Cells that are not run: those that match every key of an entry."
    )
    baseline: str | None = Field(None, description="The backend that times are divided by; the reference if left out.")
    agreement: Choice = Field(Choice.of("calibrated"), description="The rule: " + ", ".join(RULES) + ".")
    timing: Timing = Field(Timing(), description="How long to measure.")
    limits: Limits = Field(Limits(), description="What a backend's process may take.")
    size: str | None = Field(None, description="The entry of `sizes` to run.")
    sizes: dict[str, dict[str, Any]] = Field(
        {}, description="Name → keys that stand in place of the experiment's own, as `--set` would put them."
    )
    published: tuple[Published, ...] = Field((), description="What publications say; the report sets ours beside it.")
    expect: dict[str, str] = Field(
        {}, description="Backend → status that is as expected, such as `backpack: unsupported`; sets the exit code."
    )

    def combinations(self) -> Iterator[Combination]:
        """Yield what would run without `exclude`, in the order of the tables."""
        for problem in self.problems:
            for quantity in self.quantities:
                for backend in self.resolved_backends():
                    yield Combination(problem, quantity, backend)

    def chosen(self) -> list[Combination]:
        """Return what is run: the combinations that no entry of `exclude` matches."""
        return [c for c in self.combinations() if not any(matches(entry, c.facts()) for entry in self.exclude)]

    def resolved_backends(self) -> tuple[Choice, ...]:
        """Return the backends to run: those named, or all."""
        return self.backends or tuple(Choice.of(name) for name in available())

    def resolved_baseline(self) -> str | None:
        """Return the name of the backend that times are divided by; None where it is not run."""
        baseline = self.baseline or reference()
        return baseline if baseline in {choice.name for choice in self.resolved_backends()} else None

    def to_yaml(self) -> str:
        """Return the experiment as YAML, sweeps written out, defaults filled in; reading it back gives the same."""
        problems = [_plain(problem) for problem in self.problems]
        shared = {k: v for k, v in problems[0].items() if all(p[k] == v for p in problems)}
        own = [{k: v for k, v in p.items() if k not in shared} for p in problems]
        resolved = {"backends": self.resolved_backends(), "baseline": self.resolved_baseline()}
        plain = _plain(self.model_copy(update=resolved))
        del plain["problems"]
        description = plain.pop("description")
        several = {"problems": own} if len(own) > 1 else {}
        return write({"description": description, **shared, **several, **plain})


def matches(entry: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    """Return whether all that an entry of `exclude` asks for holds.

    Args:
        entry: {key: value, or several of which one is enough}.
        facts: See `Combination.facts`.
    """
    return all(any(is_meant(facts[key], value) for value in several(wanted)) for key, wanted in entry.items())


def several(wanted: Any) -> tuple[Any, ...]:  # noqa: ANN401  whatever an entry of `exclude` asks for
    """Return the values of which one is enough."""
    return wanted if isinstance(wanted, tuple) else (wanted,)


def is_meant(found: Any, wanted: Any) -> bool:  # noqa: ANN401  likewise
    """Return whether a value of `exclude` means this one; a name with options means all that have these options."""
    if not isinstance(found, Choice):
        return type(found) is type(wanted) and bool(found == wanted)  # True is not 1
    if isinstance(wanted, dict):
        options = wanted.get(found.name) or {}
        named = list(wanted) == [found.name] and isinstance(options, dict)
        return named and all(found.options.get(k) == v for k, v in options.items())
    return wanted in (found.name, str(found))


def _plain(value: Any) -> Any:  # noqa: ANN401  recursion over plain data
    if isinstance(value, Choice):
        return _plain(value.plain())
    if isinstance(value, BaseModel):
        return {name: _plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


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
