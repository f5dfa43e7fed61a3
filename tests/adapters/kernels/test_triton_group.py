"""The Triton kernels against the reference, in Triton's interpreter if there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lorary.adapters.kernels import reference

pytest.importorskip("triton")
triton_group = pytest.importorskip("lorary.adapters.kernels.triton_group")
triton_launch = pytest.importorskip("lorary.adapters.kernels.triton_launch")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton", "ignore::RuntimeWarning:triton")


@pytest.mark.usefixtures("poisoned")
def test_outputs_and_gradients_match_the_reference(
    shape: str, dtype: torch.dtype, make_case: Any, agrees_with_reference: Any
) -> None:
    agrees_with_reference(triton_group, make_case(shape, dtype).to(DEVICE))


@pytest.mark.usefixtures("poisoned")
def test_strided_rows_are_accepted(make_case: Any, agrees_with_reference: Any) -> None:
    for shape in ("one-token", "odd-sizes", "three-modules", "mixed-ranks"):
        agrees_with_reference(triton_group, make_case(shape, torch.float32, contiguous=False).to(DEVICE))


@pytest.mark.usefixtures("poisoned")
def test_gates_of_zero_add_nothing(shape: str, make_case: Any, agrees_with_reference: Any) -> None:
    agrees_with_reference(triton_group, make_case(shape, torch.float32, empty=True).to(DEVICE))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_split_k_does_not_change_the_outputs(
    parts: int, make_case: Any, agrees_with_reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_group, "choose_split_k", lambda *_, **__: parts)
    for shape in ("one-token", "three-modules", "mixed-ranks"):
        agrees_with_reference(triton_group, make_case(shape, torch.float32).to(DEVICE))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", ["one-token", "three-modules"])
def test_biases_of_base_modules_are_added(shape: str, make_case: Any, relative_error: Any) -> None:
    case = make_case(shape, torch.float32).to(DEVICE)
    linears: Any = [(weight, torch.arange(len(weight)).to(case.x)) for weight, _ in case.linears]
    if len(linears) > 1:
        linears[-1] = (linears[-1][0], None)

    found, _ = triton_group.outputs(case.x, linears, case.gates, case.weights)

    expected, _ = reference.outputs(case.x, linears, case.gates, case.weights)
    assert all(relative_error(actual, wanted) <= 1e-5 for actual, wanted in zip(found, expected, strict=True))


def test_repeated_calls_give_the_same_bits(make_case: Any) -> None:
    first, second = (make_case("three-modules", torch.float32).to(DEVICE) for _ in range(2))

    triton_group.update_(first.x, first.outputs, first.gates, first.weights)
    triton_group.update_(second.x, second.outputs, second.gates, second.weights)

    assert all(torch.equal(a, b) for a, b in zip(first.outputs, second.outputs, strict=True))


@pytest.mark.parametrize("tokens", [1, 16, 17, 256, 4096])
def test_split_k_is_used_for_few_tokens_and_covers_the_whole_axis(tokens: int) -> None:
    tiles = triton_group.choose_tiles(tokens)
    programs = -(-tokens // tiles.shrink_m) * -(-128 // tiles.shrink_c)

    parts = triton_launch.choose_split_k(4096, tiles.shrink_k, programs)

    assert parts in (1, 2, 4, 8, triton_launch.MAX_SPLIT_K)
    assert parts == 1 or parts * programs <= triton_launch.NUM_SMS
    assert tokens > 16 or parts > 1
    size = triton_launch.split_size(4096, tiles.shrink_k, parts)
    assert size % tiles.shrink_k == 0
    assert (parts - 1) * size < 4096 <= parts * size


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lorary.adapters.kernels.triton_group import choose_tiles
from lorary.adapters.kernels.triton_gates import gate_kernel, score_kernel
from lorary.adapters.kernels.triton_kernels import expand_kernel, shrink_kernel

FLOATS = ("gate_ptr", "out_ptr", "low_ptr", "rows_ptr", "squares_ptr", "scores_ptr", "slot_gate_ptr")
INTEGERS = ("index_ptr", "expert_ptr", "slot_ptr", "group_ptr")
TYPES = dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(INTEGERS, "*i64")
FLAGS = {"HAS_COLUMNS": True, "SKIP_ZEROS": True, "UPCAST": False}
SIZES = {"RANK": 128, "SPLIT_K": 4, "GROUP_SIZE": 2, "EPSILON": 1e-6}

def compiled(kernel, kind, warps, **blocks):
    names = kernel.arg_names
    constants = {name: value for name, value in {**FLAGS, **SIZES, **blocks}.items() if name in names}
    signature = {
        name: "constexpr" if name in constants else TYPES.get(name, f"*{kind}" if name.endswith("_ptr") else "i32")
        for name in names
    }
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})

for kind in ("bf16", "fp32"):
    for tokens in (1, 4096):
        t, is_few, two_terms = choose_tiles(tokens), tokens == 1, kind == "bf16"
        shrink = {"BLOCK_M": t.shrink_m, "BLOCK_C": t.shrink_c, "BLOCK_K": t.shrink_k}
        expand = {"BLOCK_M": t.expand_m, "BLOCK_N": t.expand_n, "BLOCK_R": t.expand_r}
        few = {"ACCUMULATE": not is_few, "HAS_BASE": is_few, "HAS_BIAS": is_few}
        score = {"BLOCK_M": t.score_m, "BLOCK_C": t.score_c, "BLOCK_K": t.score_k}
        for made in (
            compiled(shrink_kernel, kind, t.shrink_warps, **shrink),
            compiled(expand_kernel, kind, t.expand_warps, **few, **expand),
            compiled(score_kernel, kind, t.score_warps, TWO_TERMS=two_terms, **score),
            compiled(gate_kernel, kind, 4, BLOCK_M=16, BLOCK_R=64),
        ):
            assert ".target sm_90" in made.asm["ptx"]
            assert made.asm["cubin"]
            print(kind, tokens)
"""


def test_kernels_compile_ahead_of_time_for_sm_90_without_a_gpu(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE], env=environment, capture_output=True, text=True, check=False
    )

    if "ptxas" in done.stderr and "not found" in done.stderr.lower():
        pytest.skip("this Triton has no ptxas")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 16
