"""What no conformance case covers: layers and options of torch.nn that the tables of `families.py` leave out.

Layers are found by introspection, their options in the constructors' signatures. What is not tried is in `EXEMPT`, with
the reason; `uncovered()` is what is neither tried nor there.
"""

import warnings
from fnmatch import fnmatchcase
from typing import Literal, get_args, get_origin

import torch
from torch import nn

from testbed.conformance.family import options_of
from testbed.conformance.layers import layer_cases

EXEMPT: dict[str, str] = {
    "*.device": "where, not what",
    "*.dtype": "the matrix is in float64",
    "*.inplace": "an option of activations, which own no parameters; whole-model cases have it",
    "*._weight": "private: how from_pretrained passes the values",
    "*._freeze": "private: frozen parameters are whole-model cases",
    "*.d_model": "a size whose default means nothing; the cases have their own",
    "ConvTranspose?d.padding_mode": "only 'zeros' is accepted",
    "LinearCrossEntropyLoss.reduction": "the contract asks for one loss a sample: always 'none'",
    "SyncBatchNorm.process_group": "needs several processes",
    "Transformer.custom_*coder": "is whatever module is given",
    "Lazy*": "turns into the class without Lazy at its first call",
    "RNNBase": "the base of RNN, LSTM and GRU, which are covered",
    "RNNCellBase": "the base of the cells, which are covered",
    "DataParallel": "holds the module it is given and splits the batch over GPUs",
    "Sequential": "holds the modules it is given; whole-model cases are made of them",
    "FractionalMaxPool?d": "owns no parameters, but its constructor cannot be guessed",
    "Unflatten": "owns no parameters, but its constructor cannot be guessed",
}


def _owns_parameters(layer: type[nn.Module]) -> bool:
    options = options_of(layer)
    needed = {name: 6 for name, p in options.items() if p.default is p.empty}
    switches = [{name: True} for name, p in options.items() if p.default is False]
    with warnings.catch_warnings(), torch.device("meta"):  # the default Transformer is large
        warnings.simplefilter("ignore")  # deprecated and lazy classes say so; they are looked at, not used
        try:
            return any(list(layer(**needed, **switch).parameters()) for switch in [{}, *switches])
        except Exception:
            return True  # a constructor that wants more than numbers: for a person to look at, `uncovered` names it


def parametrised_layers() -> set[type[nn.Module]]:
    """Return the classes of torch.nn that own parameters, in some configuration, or that no guess constructs."""
    found = {c for c in vars(nn).values() if isinstance(c, type) and issubclass(c, nn.Module)}
    return {c for c in found if _owns_parameters(c)}


def uncovered() -> list[str]:
    """Return every layer, option and listed value of torch.nn that no case covers and no exemption excuses."""
    cases, missing = layer_cases(), []
    for layer in sorted(parametrised_layers(), key=lambda c: c.__name__):
        name = layer.__name__
        said = {c.option for c in cases if c.layer == name}
        tried = said | {option.partition("=")[0] for option in said}
        wanted = [] if said else [name]
        for option, p in options_of(layer).items() if said else []:
            if p.default is not p.empty and not any(fnmatchcase(f"{name}.{option}", e) for e in EXEMPT):
                values = get_args(p.annotation) if get_origin(p.annotation) is Literal else ()
                wanted += [o for o in [option, *(f"{option}={v!r}" for v in values)] if o not in tried]
        if not any(fnmatchcase(name, e) for e in EXEMPT):
            missing += [name if w == name else f"{name}.{w}" for w in wanted]
    return missing
