"""The Triton kernels, compiled for an H100, which need not be here."""

import warnings
from typing import Any

import pytest

pytest.importorskip("triton")

KNOWN = {"known_ptr": "*fp64", "allowed": "fp32"}
"""Types of what a kernel is given of what is known already."""


def compiled(kernel: Any, constants: dict[str, Any], kinds: dict[str, Any]) -> Any:
    """Return a kernel compiled for it."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Triton about its own defaults
        return compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize(("dtype", "precision"), [("fp32", "bf16x6"), ("fp32", "tf32"), ("bf16", "ieee")])
def test_convolutions_compile_for_a_gpu_that_is_not_here(dtype: str, precision: str, write: bool) -> None:
    from backends.ops.conv_kernel import _product, _product_by_few

    constants = {"HEIGHT": 64, "WIDTH": 64, "DEPTH": 32, "PRECISION": precision}
    pointers = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "out_ptr": f"*{dtype}" if write else "*fp32"}
    tuples = {"x_stride": 6, "y_stride": 6, **dict.fromkeys(("size", "out_size", "kernel"), 3)}
    tuples |= dict.fromkeys(("stride", "padding", "dilation"), 3)
    kinds = {**pointers, **KNOWN, **{name: ("i32",) * length for name, length in tuples.items()}}
    assert compiled(_product, constants | {"WRITE": write}, kinds).metadata.shared < 2**16
    if not write:
        ones = dict.fromkeys(("length", "groups", "down", "across", "programs"), 1)
        for some in ({}, ones):  # Triton makes a constant of 1
            assert compiled(_product_by_few, constants | some | {"KNOWN": 4}, kinds).metadata.shared < 2**16


@pytest.mark.parametrize(
    ("dtype", "precision"), [("fp32", "bf16x6"), ("fp32", "bf16x3"), ("fp32", "tf32"), ("bf16", "ieee")]
)
def test_products_compile_for_a_gpu_that_is_not_here(dtype: str, precision: str) -> None:
    from backends.ops.kernels import _squares, _squares_by_few

    constants = {"HEIGHT": 64, "WIDTH": 64, "DEPTH": 32, "PRECISION": precision}
    kinds = {"left_ptr": f"*{dtype}", "right_ptr": f"*{dtype}", "out_ptr": "*fp32", **KNOWN}
    kinds |= dict.fromkeys(("left_stride", "right_stride"), ("i32",) * 3)
    for one_tile in ({}, {"down": 1, "across": 1}):  # Triton makes a constant of 1
        alone = one_tile and {"programs": 1}
        for made in (
            *(compiled(_squares, constants | one_tile | {"KNOWN": known}, kinds) for known in (0, 4)),
            compiled(_squares_by_few, constants | one_tile | alone | {"KNOWN": 4}, kinds),
        ):
            assert "wgmma" in made.asm["ptx"]  # by tensor cores


def test_sums_of_inner_products_compile_for_a_gpu_that_is_not_here() -> None:
    from backends.ops.gram_kernel import _sums

    kinds = {"lefts_ptr": "*fp32", "rights_ptr": "*fp32", "out_ptr": "*fp64"}
    kinds |= dict.fromkeys(("left_roundings", "right_roundings"), "fp32")
    for one_block in ({}, {"blocks": 1}):  # Triton makes a constant of 1
        assert compiled(_sums, {"ROWS": 16, "COLUMNS": 64, "SMALLEST": 1.0} | one_block, kinds).metadata.shared < 2**16


@pytest.mark.parametrize(("dtype", "precision"), [("fp32", "bf16x6"), ("bf16", "ieee")])
def test_inner_products_compile_for_a_gpu_that_is_not_here(dtype: str, precision: str) -> None:
    from backends.ops.gram_kernel import _upper

    kinds = {"left_ptr": f"*{dtype}", "right_ptr": f"*{dtype}", "lefts_ptr": "*fp32", "rights_ptr": "*fp32"}
    kinds |= dict.fromkeys(("left_stride", "right_stride"), ("i32",) * 3)
    for one_tile in ({}, {"tiles": 1}):  # Triton makes a constant of 1
        made = compiled(_upper, {"SIZE": 64, "DEPTH": 32, "PRECISION": precision} | one_tile, kinds)
        assert "wgmma" in made.asm["ptx"]  # by tensor cores


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_outer_products_compile_for_a_gpu_that_is_not_here(dtype: str) -> None:
    from backends.ops.kernels import _outer

    kinds = {**dict.fromkeys(("left_ptr", "right_ptr", "out_ptr"), f"*{dtype}")}
    kinds |= dict.fromkeys(("left_stride", "right_stride"), ("i32",) * 2)
    assert compiled(_outer, {"HEIGHT": 8, "WIDTH": 1024}, kinds).metadata.shared < 2**16
