"""Cases of every parametrised layer of torch.nn: each constructor option that changes the mathematics, each layout.

The layers are found by introspection, their options in the constructors' signatures. What to try is in the tables
`_dense` to `_transformers`, what is not tried in `EXEMPT`, with the reason; `uncovered()` is what is in neither.
"""

import inspect
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal, get_args, get_origin, get_overloads

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from testbed.conformance.case import Case, D, Forward, Layout, N, Setup, T, case, everyday, sequence_first, tokens

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


def _call(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)  # type: ignore[no-any-return]  # a module's call is untyped, here and below


def _quietly(use: Forward) -> Forward:
    """Return `use` without torch's remarks that a kernel copies its input or has no oneDNN form: that is not news."""

    def quiet(layer: nn.Module, x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using padding='same' with even kernel|LSTM with projections is not")
            return use(layer, x)

    return quiet


def _recurrent(layer: nn.RNNBase, x: Tensor, final: bool = False) -> Tensor:
    """Return outputs [N, T, H], or the final states [N, layers, H]."""
    outputs, last = layer(x if layer.batch_first else x.transpose(0, 1))
    if final:
        return torch.cat(last if isinstance(last, tuple) else [last], 2).transpose(0, 1)
    return outputs if layer.batch_first else outputs.transpose(0, 1)  # type: ignore[no-any-return]


def _steps(layer: nn.Module, x: Tensor) -> Tensor:
    """Return a cell's hidden state [..., H] after the positions of x [..., T, D], one at a time."""
    state = None
    for step in x.unbind(-2):
        state = layer(step, state)
    return state[0] if isinstance(state, tuple) else state  # type: ignore[return-value]  # there is a position


def _attend(layer: nn.MultiheadAttention, x: Tensor, padded: Tensor | None = None, **options: bool | Tensor) -> Tensor:
    """Return attention [N, T, D] of x over its own first kdim, vdim features; unaveraged: the weights."""
    x = x if layer.batch_first else x.transpose(0, 1)
    y, weights = layer(x, x[..., : layer.kdim], x[..., : layer.vdim], key_padding_mask=padded, **options)
    if "average_attn_weights" in options:
        return weights  # type: ignore[no-any-return]
    return y if layer.batch_first else y.transpose(0, 1)  # type: ignore[no-any-return]


def _transform(layer: nn.Module, x: Tensor, padded: Tensor | None = None, causal: str = "", pads: str = "") -> Tensor:
    """Return [N, T, D]; a second sequence is the first 3 positions; `causal` and `pads` name the masks' arguments."""
    masks = ({causal: _later(x)} if causal else {}) | ({pads: padded} if pads else {})
    first = any(m.batch_first for m in layer.modules() if isinstance(m, nn.MultiheadAttention))
    x = x if first else x.transpose(0, 1)
    both = (x, x[:, :3] if first else x[:3])
    if isinstance(layer, nn.Transformer):
        y = layer(*reversed(both), **masks)
    else:
        y = layer(*both[: 1 + ("Decoder" in type(layer).__name__)], **masks)
    return y if first else y.transpose(0, 1)  # type: ignore[no-any-return]


def _later(x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)


def _up(x: Tensor) -> Tensor:
    """Return the positions [T] of x [N, T, ...]."""
    return torch.arange(x.shape[1], device=x.device)


def _bags(layer: nn.EmbeddingBag, x: Tensor, starts: tuple[int, ...] = ()) -> Tensor:
    """Return bags [N, ..., D] of tokens [N, T]: a bag a row, or by offsets, bags at each row's `starts`."""
    if not (starts or layer.include_last_offset):
        return _call(layer, x)
    starts = starts or (0,)
    rows = torch.arange(0, x.numel(), x.shape[1], device=x.device)
    offsets = torch.stack([rows + s for s in starts], 1).flatten()
    end = offsets.new_full((int(layer.include_last_offset),), x.numel())
    return layer(x.flatten(), torch.cat([offsets, end])).unflatten(0, (-1, len(starts)))  # type: ignore[no-any-return]


def _padding(n: int) -> tuple[Tensor]:
    """Return a mask [n, T] of padded positions, different for each sample."""
    return (torch.arange(T) > torch.arange(n)[:, None] % T,)


def _unbatched(layer: nn.Module, x: Tensor) -> Tensor:
    ys = [layer(s) for s in x]
    return torch.stack([y[0] if isinstance(y, tuple) else y for y in ys])


_Options = Mapping[str, object]


def _each(**options: tuple[object, ...]) -> list[_Options]:
    """Return the options one at a time, each with each of its values."""
    return [{option: value} for option, values in options.items() for value in values]


def _ranks(*shapes: tuple[int, ...]) -> dict[str, Layout]:
    return {f"input {len(shape) + 1}-D": Layout(_call, shape) for shape in shapes}


def _text(value: object) -> str:
    """Return a value as it stands in a case's name; functions and modules have no stable repr."""
    value = value.func if isinstance(value, partial) else value
    return getattr(value, "__name__", None) or repr(value)


def _make(layer: str, arguments: _Options, layout: Layout) -> Setup:
    made = {name: a() if isinstance(a, partial) else a for name, a in arguments.items()}
    with warnings.catch_warnings():  # nested tensors are a fast path of inference, which no gradient takes
        warnings.filterwarnings("ignore", "enable_nested_tensor is True")
        return layout.setup(getattr(nn, layer)(**made))


def _family(
    layer: str, base: _Options, layout: Layout, options: list[_Options], layouts: Mapping[str, Layout] | None = None
) -> Iterator[Case]:
    """Yield the cases of one layer; none of a layer or option that the installed torch lacks.

    Args:
        layer: Its name in torch.nn.
        base: Arguments of every case; a `partial` is called anew for each model.
        layout: How the model calls it, if nothing else is said.
        options: What to try in place of the base; the first counts as tried, others let it matter.
        layouts: Other ways to call it, by words, or by the option that asks for it.
    """
    known = options_of(getattr(nn, layer)) if hasattr(nn, layer) else {}
    tried = {", ".join(f"{o}={_text(v)}" for o, v in these.items()): these for these in options}
    rows = {"": layout} | {said: replace(layout, options=these, reason="") for said, these in tried.items()}
    for said, how in (rows | dict(layouts or {})).items() if known else []:
        if how.options.keys() <= known.keys():
            name = f"{layer}({said})" if said.partition("=")[0] in known else f"{layer} {said}".strip()
            arguments = {**base, **how.options}
            # Dropout is off in eval mode, and only there does the model repeat itself.
            how = replace(how, training=how.training and not arguments.get("dropout"))
            yield case(name, layer, said, partial(_make, layer, arguments, how), how.reason)


def _dense() -> Iterator[Case]:
    flat, sequence, bias = Layout(_call, (D,)), Layout(_call, (T, D)), _each(bias=(False,))
    layouts = _ranks((T, D), (2, T, D), (3, 2, T, D)) | everyday(sequence) | sequence_first(sequence)
    yield from _family("Linear", {"in_features": D, "out_features": 7}, flat, bias, layouts)
    pair = Layout(lambda f, x: f(x[..., :5], x[..., 5:]), (T, 11))
    base: _Options = {"in1_features": 5, "in2_features": D, "out_features": 7}
    layouts = {"input 2-D": replace(pair, shape=(11,))} | everyday(pair) | sequence_first(pair)
    yield from _family("Bilinear", base, pair, bias, layouts)
    channels = Layout(_call, (D, 7))
    layouts = _ranks((D,), (D, 7, 5)) | everyday(channels, unbatched=False)
    yield from _family("PReLU", {"num_parameters": D}, channels, _each(num_parameters=(1,), init=(0.5,)), layouts)

    labels = Layout(lambda f, x, y: f(x, y).output[:, None], (20,), extra=lambda n: (torch.arange(n) * 5 % 9,))
    base = {"in_features": 20, "n_classes": 9, "cutoffs": [3, 6]}
    layouts = {"log_prob": Layout(lambda f, x: f.log_prob(x), (20,), reason="a method, not the module, is called")}
    options = _each(cutoffs=([5],), div_value=(2.0,), head_bias=(True,))
    yield from _family("AdaptiveLogSoftmaxWithLoss", base, labels, options, layouts)
    loss = Layout(
        lambda f, x, y: f(x, y if f.out_features else y[:, 0]).view(len(x), -1),
        (D,),
        extra=lambda n: (tokens(7, n, 2),),
    )
    base = {"in_features": D, "num_classes": 7, "reduction": "none"}
    chunks = getattr(nn, "LinearCrossEntropyOptions", None)  # an older torch has neither it nor the layer
    options = _each(out_features=((2,),), bias=(True,), ignore_index=(0,), label_smoothing=(0.1,))
    options += _each(weight=(partial(torch.linspace, 0.5, 2, 7),), options=(partial(chunks),) if chunks else ())
    yield from _family("LinearCrossEntropyLoss", base, loss, options)


def _embeddings() -> Iterator[Case]:
    words, bags = Layout(_call, None), Layout(_bags, None)
    options = _each(padding_idx=(0, -1), max_norm=(0.5,), scale_grad_by_freq=(True,), sparse=(True,))
    options += [{"norm_type": 1.0, "max_norm": 0.5}]
    layouts = {
        "input 1-D": replace(words, tokens=lambda n: tokens(7, n)),
        "input 3-D": replace(words, tokens=lambda n: tokens(7, n, T, 2)),
        "positions [T]": Layout(lambda f, x: x + f(_up(x)), (T, D), reason="the input has no batch axis"),
        "positions [T], T = N": Layout(lambda f, x: x + f(_up(x)), (N, D), reason="positions look like samples"),
        "positions [1, T]": Layout(lambda f, x: x + f(_up(x)[None]), (T, D), reason="opacus#841: a batch of 1"),
        "positions [N, T]": Layout(lambda f, x: x + f(_up(x).expand(len(x), -1)), (T, D), reason="an expanded input"),
    }
    base = {"num_embeddings": 7, "embedding_dim": D}
    yield from _family("Embedding", base, words, options, layouts | sequence_first(words))
    layouts = {
        "offsets": replace(bags, use=partial(_bags, starts=(0,)), reason="opacus#518: the offsets tell the batch"),
        "two bags a sample": replace(bags, use=partial(_bags, starts=(0, 2)), reason="the layer's batch is 2N"),
        "empty bags": replace(bags, use=partial(_bags, starts=(0, 0)), reason="a mean over nothing"),
        "weighted": Layout(
            lambda f, x: f(_up(x).expand(len(x), -1), per_sample_weights=x), (T,), {"mode": "sum"}, reason="two inputs"
        ),
    }
    options += [*_each(mode=("sum", "max"), include_last_offset=(True,)), {"padding_idx": 0, "mode": "max"}]
    yield from _family("EmbeddingBag", base, bags, options, layouts)


def _convolutions() -> Iterator[Case]:
    for d in (1, 2, 3):
        x = Layout(_call, (D, *(8, 7, 5)[:d]))
        base = {"in_channels": D, "out_channels": 10, "kernel_size": 3, "padding": 1}
        per_axis = _each(kernel_size=(1, (2, 3, 1)[:d]), stride=(2, (3, 1, 2)[:d]), dilation=(2, (2, 1, 2)[:d]))
        grouped: list[_Options] = [{"groups": 2}, {"groups": D, "out_channels": 12}]
        both = [*per_axis, *grouped, {"bias": False}, {"stride": 3, "kernel_size": 2}]
        modes = ("zeros", "reflect", "replicate", "circular")
        options: list[_Options] = [
            *both,
            *_each(padding=(0, (2, 0, 1)[:d], "same", "valid"), padding_mode=modes),
            {"padding": "same", "dilation": 2},
            {"stride": 2, "dilation": 2, "groups": 2},
            {"padding_mode": "reflect", "padding": "same"},
            {"padding_mode": "circular", "padding": (2, 0, 1)[:d], "stride": 2, "groups": 2},
        ]
        layouts = everyday(x) | {"batch of 33": replace(x, samples=33, reason="ExpandedWeights switches method at 32")}
        layouts["padding='same', kernel_size=2"] = replace(
            x, use=_quietly(_call), options={"padding": "same", "kernel_size": 2}, reason="padded on one side only"
        )
        yield from _family(f"Conv{d}d", base, x, options, layouts)

        x = replace(x, shape=(D, *(5, 3, 3)[:d]))
        layouts = everyday(x)
        layouts["output_size given"] = replace(
            x, use=lambda f, x: f(x, output_size=[2 * s for s in x.shape[2:]]), options={"stride": 2}
        )
        options = [
            *both,
            *_each(padding=(0, (2, 0, 1)[:d])),
            {"output_padding": 1, "stride": 2},
            {"output_padding": (1, 0, 1)[:d], "stride": 2},
            {"stride": 2, "output_padding": 1, "dilation": 2, "groups": 2},
        ]
        yield from _family(f"ConvTranspose{d}d", base, x, options, layouts)


def _norms() -> Iterator[Case]:
    sequence, image = Layout(_call, (T, D)), Layout(_call, (D, 7, 5))
    layouts = _ranks((D,), (2, T, D)) | everyday(sequence) | sequence_first(sequence)
    options = _each(normalized_shape=([T, D],), eps=(0.1,), elementwise_affine=(False,), bias=(False,))
    for name in ("LayerNorm", "RMSNorm"):
        yield from _family(name, {"normalized_shape": D}, sequence, options, layouts)
    common = _each(eps=(0.1,), affine=(False,), bias=(False,))
    layouts = _ranks((D,), (D, 7), (D, 2, 3, 5)) | everyday(image, unbatched=False)
    base: _Options = {"num_groups": 2, "num_channels": D}
    yield from _family("GroupNorm", base, image, common + _each(num_groups=(1, D)), layouts)
    for d in (1, 2, 3):
        x = Layout(_call, (D, *(7, 5, 2)[:d]))
        tracked: _Options = {"track_running_stats": True}
        layouts = everyday(x) | {"running statistics, in eval mode": replace(x, options=tracked, training=False)}
        options = [*common, tracked, {"momentum": 0.3, **tracked}]
        yield from _family(f"InstanceNorm{d}d", {"num_features": D, "affine": True}, x, options, layouts)
        settled = replace(x, training=False)  # in training mode there is no gradient of a sample's own: one case each
        layouts = everyday(settled, unbatched=False) | {"in training mode": replace(x, reason="mixes the samples")}
        layouts |= {"input 2-D": replace(settled, shape=(D,))} if d == 1 else {}
        options = common + _each(momentum=(0.3, None), track_running_stats=(False,))
        for name in [f"BatchNorm{d}d", "SyncBatchNorm"] if d == 2 else [f"BatchNorm{d}d"]:
            yield from _family(name, {"num_features": D}, settled, options, layouts)


_SECOND_AXIS = "the batch is on the second axis"
_SQUARE = "the batch is on the second axis, and with T = N no shape shows it"


def _sequences() -> Iterator[Case]:
    x, last = Layout(_recurrent, (T, D), reason=_SECOND_AXIS), partial(_recurrent, final=True)
    layouts = {
        "T = N": replace(x, shape=(N, D), reason=_SQUARE),
        "batch_first=True, T = N": Layout(_recurrent, (N, D), {"batch_first": True}),
        "final state": replace(x, use=last, reason="the second output is used, the first is not"),
        "batch_first=True, final state": Layout(last, (T, D), {"batch_first": True}, reason="axes of outputs differ"),
        "one unbatched call a sample": Layout(_unbatched, (T, D), reason="there is no batch axis"),
        "proj_size=3": Layout(_quietly(_recurrent), (T, D), {"proj_size": 3}),
    }
    options = _each(num_layers=(2,), bias=(False,), batch_first=(True,), bidirectional=(True,), nonlinearity=("relu",))
    options += [{"dropout": 0.3, "num_layers": 2}, {"bidirectional": True, "num_layers": 2, "batch_first": True}]
    for name in ("RNN", "LSTM", "GRU"):
        yield from _family(name, {"input_size": D, "hidden_size": 7}, x, options, layouts)
    step = Layout(_steps, (2, D))  # the second step has a state that is not zero
    layouts = {
        "loop over positions": replace(step, shape=(T, D), reason="one module, T calls"),
        "loop over positions, T = N": replace(step, shape=(N, D)),
        "one unbatched call a sample": replace(step, use=lambda f, x: torch.stack([_steps(f, s) for s in x])),
    }
    for name in ("RNNCell", "LSTMCell", "GRUCell"):
        options = _each(bias=(False,), nonlinearity=("relu",))
        yield from _family(name, {"input_size": D, "hidden_size": 7}, step, options, layouts)


def _transformers() -> Iterator[Case]:
    x, first = Layout(_attend, (T, D), reason=_SECOND_AXIS), {"batch_first": True}
    layouts = {
        "T = N": replace(x, shape=(N, D), reason=_SQUARE),
        "batch_first=True, T = N": Layout(_attend, (N, D), first),
        "key_padding_mask": replace(x, extra=_padding, reason="an input that differs by sample and has no gradient"),
        "causal": replace(x, use=lambda f, x: _attend(f, x, attn_mask=_later(x))),
        "without weights": replace(x, use=partial(_attend, need_weights=False), reason="takes the fused kernel"),
        "weights": replace(x, use=partial(_attend, average_attn_weights=False), reason="the second output is used"),
        "one unbatched call a sample": Layout(lambda f, x: torch.stack([f(s, s, s)[0] for s in x]), (T, D)),
    }
    options = _each(num_heads=(1,), dropout=(0.3,), bias=(False,), add_bias_kv=(True,), add_zero_attn=(True,))
    options += _each(kdim=(3,), vdim=(5,), batch_first=(True,))
    yield from _family("MultiheadAttention", {"embed_dim": D, "num_heads": 2}, x, options, layouts)

    base: _Options = {"d_model": D, "nhead": 2, "dim_feedforward": 7, "dropout": 0.0}
    one: _Options = {"num_encoder_layers": 1, "num_decoder_layers": 1}
    options = _each(nhead=(3,), dim_feedforward=(10,), dropout=(0.3,), activation=("gelu", F.silu), bias=(False,))
    options += _each(layer_norm_eps=(0.1,), batch_first=(True,), norm_first=(True,))
    options += _each(num_encoder_layers=(2,), num_decoder_layers=(2,))
    x = Layout(_transform, (T, D), reason=_SECOND_AXIS)
    square = {"T = N": replace(x, shape=(N, D), reason=_SQUARE)}
    for name, mask in ("TransformerEncoderLayer", "src"), ("TransformerDecoderLayer", "tgt"), ("Transformer", "tgt"):
        layouts = {
            "batch_first=True, T = N": Layout(_transform, (N, D), first),
            "padded": Layout(partial(_transform, pads=f"{mask}_key_padding_mask"), (T, D), extra=_padding),
            "causal": Layout(partial(_transform, causal=f"{mask}_mask"), (T, D)),
        }
        yield from _family(name, {**base, **(one if name == "Transformer" else {})}, x, options, square | layouts)
    for part, alone in ("encoder", {"enable_nested_tensor": False}), ("decoder", {}):
        name, inner = f"Transformer{part.capitalize()}", f"{part}_layer"
        make = partial(getattr(nn, f"{name}Layer"), **base)
        turned: _Options = {inner: partial(make, batch_first=True)}
        layouts = {"batch first, T = N": Layout(_transform, (N, D), turned)}
        options = _each(num_layers=(2,), norm=(partial(nn.LayerNorm, D),), mask_check=(False,))
        options += [{"enable_nested_tensor": True, **turned}]
        yield from _family(name, {inner: make, "num_layers": 1, **alone}, x, options, square | layouts)


def layer_cases() -> list[Case]:
    """Return the cases of all layers, none of them built."""
    families = (_dense, _embeddings, _convolutions, _norms, _sequences, _transformers)
    return [one for family in families for one in family()]


def options_of(layer: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """Return a constructor's arguments by name; where it is overloaded, those of all overloads."""
    constructors = get_overloads(layer.__init__) or [layer.__init__]
    named = [p for c in constructors for p in list(inspect.signature(c).parameters.values())[1:]]
    return {p.name: p for p in named if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


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
