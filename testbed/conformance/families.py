"""The tables: what is tried of each layer of torch.nn, option by option, and how models call it."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from testbed.conformance.case import Case, D, Layout, N, T, everyday, sequence_first, tokens
from testbed.conformance.family import Options, each, family, ranks
from testbed.conformance.uses import (
    attend,
    call,
    in_bags,
    later,
    padded_positions,
    quietly,
    recurrent,
    steps,
    transform,
    unbatched,
    up,
)


def _dense() -> Iterator[Case]:
    flat, sequence, bias = Layout(call, (D,)), Layout(call, (T, D)), each(bias=(False,))
    layouts = ranks((T, D), (2, T, D), (3, 2, T, D)) | everyday(sequence) | sequence_first(sequence)
    yield from family("Linear", {"in_features": D, "out_features": 7}, flat, bias, layouts)
    pair = Layout(lambda f, x: f(x[..., :5], x[..., 5:]), (T, 11))
    base: Options = {"in1_features": 5, "in2_features": D, "out_features": 7}
    layouts = {"input 2-D": replace(pair, shape=(11,))} | everyday(pair) | sequence_first(pair)
    yield from family("Bilinear", base, pair, bias, layouts)
    channels = Layout(call, (D, 7))
    layouts = ranks((D,), (D, 7, 5)) | everyday(channels, unbatched=False)
    yield from family("PReLU", {"num_parameters": D}, channels, each(num_parameters=(1,), init=(0.5,)), layouts)

    labels = Layout(lambda f, x, y: f(x, y).output[:, None], (20,), extra=lambda n: (torch.arange(n) * 5 % 9,))
    base = {"in_features": 20, "n_classes": 9, "cutoffs": [3, 6]}
    layouts = {"log_prob": Layout(lambda f, x: f.log_prob(x), (20,), reason="a method, not the module, is called")}
    options = each(cutoffs=([5],), div_value=(2.0,), head_bias=(True,))
    yield from family("AdaptiveLogSoftmaxWithLoss", base, labels, options, layouts)
    loss = Layout(
        lambda f, x, y: f(x, y if f.out_features else y[:, 0]).view(len(x), -1),
        (D,),
        extra=lambda n: (tokens(7, n, 2),),
    )
    base = {"in_features": D, "num_classes": 7, "reduction": "none"}
    chunks = getattr(nn, "LinearCrossEntropyOptions", None)  # an older torch has neither it nor the layer
    options = each(out_features=((2,),), bias=(True,), ignore_index=(0,), label_smoothing=(0.1,))
    options += each(weight=(partial(torch.linspace, 0.5, 2, 7),), options=(partial(chunks),) if chunks else ())
    yield from family("LinearCrossEntropyLoss", base, loss, options)


def _embeddings() -> Iterator[Case]:
    words, bags = Layout(call, None), Layout(in_bags, None)
    options = each(padding_idx=(0, -1), max_norm=(0.5,), scale_grad_by_freq=(True,), sparse=(True,))
    options += [{"norm_type": 1.0, "max_norm": 0.5}]
    layouts = {
        "input 1-D": replace(words, tokens=lambda n: tokens(7, n)),
        "input 3-D": replace(words, tokens=lambda n: tokens(7, n, T, 2)),
        "positions [T]": Layout(lambda f, x: x + f(up(x)), (T, D), reason="the input has no batch axis"),
        "positions [T], T = N": Layout(lambda f, x: x + f(up(x)), (N, D), reason="positions look like samples"),
        "positions [1, T]": Layout(lambda f, x: x + f(up(x)[None]), (T, D), reason="opacus#841: a batch of 1"),
        "positions [N, T]": Layout(lambda f, x: x + f(up(x).expand(len(x), -1)), (T, D), reason="an expanded input"),
    }
    base = {"num_embeddings": 7, "embedding_dim": D}
    yield from family("Embedding", base, words, options, layouts | sequence_first(words))
    layouts = {
        "offsets": replace(bags, use=partial(in_bags, starts=(0,)), reason="opacus#518: the offsets tell the batch"),
        "offsets, no token twice": replace(
            bags, use=partial(in_bags, starts=(0,)), tokens=lambda n: torch.arange(T) + torch.arange(n)[:, None] % 3
        ),
        "two bags a sample": replace(bags, use=partial(in_bags, starts=(0, 2)), reason="the layer's batch is 2N"),
        "empty bags": replace(bags, use=partial(in_bags, starts=(0, 0)), reason="a mean over nothing"),
        "weighted": Layout(
            lambda f, x: f(up(x).expand(len(x), -1), per_sample_weights=x),
            (T,),
            {"mode": "sum"},
            reason="two inputs",
        ),
    }
    options += [*each(mode=("sum", "max"), include_last_offset=(True,)), {"padding_idx": 0, "mode": "max"}]
    yield from family("EmbeddingBag", base, bags, options, layouts)


def _convolutions() -> Iterator[Case]:
    for d in (1, 2, 3):
        x = Layout(call, (D, *(8, 7, 5)[:d]))
        base = {"in_channels": D, "out_channels": 10, "kernel_size": 3, "padding": 1}
        per_axis = each(kernel_size=(1, (2, 3, 1)[:d]), stride=(2, (3, 1, 2)[:d]), dilation=(2, (2, 1, 2)[:d]))
        grouped: list[Options] = [{"groups": 2}, {"groups": D, "out_channels": 12}]
        both = [*per_axis, *grouped, {"bias": False}, {"stride": 3, "kernel_size": 2}]
        modes = ("zeros", "reflect", "replicate", "circular")
        options: list[Options] = [
            *both,
            *each(padding=(0, (2, 0, 1)[:d], "same", "valid"), padding_mode=modes),
            {"padding": "same", "dilation": 2},
            {"stride": 2, "dilation": 2, "groups": 2},
            {"padding_mode": "reflect", "padding": "same"},
            {"padding_mode": "circular", "padding": (2, 0, 1)[:d], "stride": 2, "groups": 2},
        ]
        layouts = everyday(x) | {"batch of 33": replace(x, samples=33, reason="ExpandedWeights switches method at 32")}
        layouts["padding='same', kernel_size=2"] = replace(
            x, use=quietly(call), options={"padding": "same", "kernel_size": 2}, reason="padded on one side only"
        )
        yield from family(f"Conv{d}d", base, x, options, layouts)

        x = replace(x, shape=(D, *(5, 3, 3)[:d]))
        layouts = everyday(x)
        layouts["output_size given"] = replace(
            x, use=lambda f, x: f(x, output_size=[2 * s for s in x.shape[2:]]), options={"stride": 2}
        )
        options = [
            *both,
            *each(padding=(0, (2, 0, 1)[:d])),
            {"output_padding": 1, "stride": 2},
            {"output_padding": (1, 0, 1)[:d], "stride": 2},
            {"stride": 2, "output_padding": 1, "dilation": 2, "groups": 2},
        ]
        yield from family(f"ConvTranspose{d}d", base, x, options, layouts)


def _norms() -> Iterator[Case]:
    sequence, image = Layout(call, (T, D)), Layout(call, (D, 7, 5))
    layouts = ranks((D,), (2, T, D)) | everyday(sequence) | sequence_first(sequence)
    options = each(normalized_shape=([T, D],), eps=(0.1,), elementwise_affine=(False,), bias=(False,))
    for name in ("LayerNorm", "RMSNorm"):
        yield from family(name, {"normalized_shape": D}, sequence, options, layouts)
    common = each(eps=(0.1,), affine=(False,), bias=(False,))
    layouts = ranks((D,), (D, 7), (D, 2, 3, 5)) | everyday(image, unbatched=False)
    base: Options = {"num_groups": 2, "num_channels": D}
    yield from family("GroupNorm", base, image, common + each(num_groups=(1, D)), layouts)
    for d in (1, 2, 3):
        x = Layout(call, (D, *(7, 5, 2)[:d]))
        tracked: Options = {"track_running_stats": True}
        layouts = everyday(x) | {"running statistics, in eval mode": replace(x, options=tracked, training=False)}
        options = [*common, tracked, {"momentum": 0.3, **tracked}]
        yield from family(f"InstanceNorm{d}d", {"num_features": D, "affine": True}, x, options, layouts)
        settled = replace(x, training=False)  # in training mode there is no gradient of a sample's own: one case each
        layouts = everyday(settled, unbatched=False) | {"in training mode": replace(x, reason="mixes the samples")}
        layouts |= {"input 2-D": replace(settled, shape=(D,))} if d == 1 else {}
        options = common + each(momentum=(0.3, None), track_running_stats=(False,))
        for name in [f"BatchNorm{d}d", "SyncBatchNorm"] if d == 2 else [f"BatchNorm{d}d"]:
            yield from family(name, {"num_features": D}, settled, options, layouts)


_SECOND_AXIS = "the batch is on the second axis"
_SQUARE = "the batch is on the second axis, and with T = N no shape shows it"


def _sequences() -> Iterator[Case]:
    x, last = Layout(recurrent, (T, D), reason=_SECOND_AXIS), partial(recurrent, final=True)
    layouts = {
        "T = N": replace(x, shape=(N, D), reason=_SQUARE),
        "batch_first=True, T = N": Layout(recurrent, (N, D), {"batch_first": True}),
        "final state": replace(x, use=last, reason="the second output is used, the first is not"),
        "batch_first=True, final state": Layout(last, (T, D), {"batch_first": True}, reason="axes of outputs differ"),
        "one unbatched call a sample": Layout(unbatched, (T, D), reason="there is no batch axis"),
        "proj_size=3": Layout(quietly(recurrent), (T, D), {"proj_size": 3}),
    }
    options = each(num_layers=(2,), bias=(False,), batch_first=(True,), bidirectional=(True,), nonlinearity=("relu",))
    options += [{"dropout": 0.3, "num_layers": 2}, {"bidirectional": True, "num_layers": 2, "batch_first": True}]
    for name in ("RNN", "LSTM", "GRU"):
        yield from family(name, {"input_size": D, "hidden_size": 7}, x, options, layouts)
    step = Layout(steps, (2, D))  # the second step has a state that is not zero
    layouts = {
        "loop over positions": replace(step, shape=(T, D), reason="one module, T calls"),
        "loop over positions, T = N": replace(step, shape=(N, D)),
        "one unbatched call a sample": replace(step, use=lambda f, x: torch.stack([steps(f, s) for s in x])),
    }
    for name in ("RNNCell", "LSTMCell", "GRUCell"):
        options = each(bias=(False,), nonlinearity=("relu",))
        yield from family(name, {"input_size": D, "hidden_size": 7}, step, options, layouts)


def _transformers() -> Iterator[Case]:
    x, first = Layout(attend, (T, D), reason=_SECOND_AXIS), {"batch_first": True}
    layouts = {
        "T = N": replace(x, shape=(N, D), reason=_SQUARE),
        "batch_first=True, T = N": Layout(attend, (N, D), first),
        "key_padding_mask": replace(
            x, extra=padded_positions, reason="an input that differs by sample and has no gradient"
        ),
        "causal": replace(x, use=lambda f, x: attend(f, x, attn_mask=later(x))),
        "without weights": replace(x, use=partial(attend, need_weights=False), reason="takes the fused kernel"),
        "weights": replace(x, use=partial(attend, average_attn_weights=False), reason="the second output is used"),
        "one unbatched call a sample": Layout(lambda f, x: torch.stack([f(s, s, s)[0] for s in x]), (T, D)),
    }
    options = each(num_heads=(1,), dropout=(0.3,), bias=(False,), add_bias_kv=(True,), add_zero_attn=(True,))
    options += each(kdim=(3,), vdim=(5,), batch_first=(True,))
    yield from family("MultiheadAttention", {"embed_dim": D, "num_heads": 2}, x, options, layouts)

    base: Options = {"d_model": D, "nhead": 2, "dim_feedforward": 7, "dropout": 0.0}
    one: Options = {"num_encoder_layers": 1, "num_decoder_layers": 1}
    options = each(nhead=(3,), dim_feedforward=(10,), dropout=(0.3,), activation=("gelu", F.silu), bias=(False,))
    options += each(layer_norm_eps=(0.1,), batch_first=(True,), norm_first=(True,))
    options += each(num_encoder_layers=(2,), num_decoder_layers=(2,))
    x = Layout(transform, (T, D), reason=_SECOND_AXIS)
    square = {"T = N": replace(x, shape=(N, D), reason=_SQUARE)}
    for name, mask in ("TransformerEncoderLayer", "src"), ("TransformerDecoderLayer", "tgt"), ("Transformer", "tgt"):
        layouts = {
            "batch_first=True, T = N": Layout(transform, (N, D), first),
            "padded": Layout(partial(transform, pads=f"{mask}_key_padding_mask"), (T, D), extra=padded_positions),
            "causal": Layout(partial(transform, causal=f"{mask}_mask"), (T, D)),
        }
        yield from family(name, {**base, **(one if name == "Transformer" else {})}, x, options, square | layouts)
    for part, alone in ("encoder", {"enable_nested_tensor": False}), ("decoder", {}):
        name, inner = f"Transformer{part.capitalize()}", f"{part}_layer"
        make = partial(getattr(nn, f"{name}Layer"), **base)
        turned: Options = {inner: partial(make, batch_first=True)}
        layouts = {"batch first, T = N": Layout(transform, (N, D), turned)}
        options = each(num_layers=(2,), norm=(partial(nn.LayerNorm, D),), mask_check=(False,))
        options += [{"enable_nested_tensor": True, **turned}]
        yield from family(name, {inner: make, "num_layers": 1, **alone}, x, options, square | layouts)


FAMILIES = (_dense, _embeddings, _convolutions, _norms, _sequences, _transformers)
