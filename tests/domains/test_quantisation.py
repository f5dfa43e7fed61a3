"""The name of a quantisation, read from configs as the libraries write them."""

from typing import Any

import pytest

from lorary.domains.quantisation import cannot_load, quantisation_of

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (NF4, "bitsandbytes nf4"),
        ({"load_in_4bit": True}, "bitsandbytes fp4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "bitsandbytes int8"),
        (
            {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}},
            "torchao Int8WeightOnlyConfig",
        ),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "torchao int8_weight_only"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq 4-bit"),
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "awq 4-bit"),
        ({"quant_method": "fp8"}, "fp8"),
        ({}, None),
        (None, None),
        ("nf4", None),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_quantisation_is_named_by_method_and_kind(found: Any, expected: str | None, nested: bool) -> None:
    config = {"model_type": "x", "quantization_config": found}

    assert quantisation_of({"text_config": config} if nested else config) == expected


def test_a_model_without_one_has_no_name() -> None:
    assert quantisation_of({"model_type": "llama", "text_config": None}) is None


@pytest.mark.parametrize(
    ("quantisation", "error", "fix"),
    [
        ("bitsandbytes nf4", ImportError("needs bitsandbytes\nand more"), "pip install 'lorary[quantized]'"),
        ("torchao Int8WeightOnlyConfig", ImportError("needs torchao"), "pip install 'lorary[quantized]'"),
        ("gptq 4-bit", ImportError("needs optimum (`pip install optimum`)"), "install what the cause names"),
        ("fp8", RuntimeError("needs a GPU"), "full precision"),
        ("fp8", RuntimeError(), "full precision"),
    ],
)
def test_what_is_missing_is_said_with_a_way_out(quantisation: str, error: Exception, fix: str) -> None:
    refusal = cannot_load(quantisation, error)

    assert refusal.exit_code == 6
    assert quantisation in refusal.message
    assert refusal.cause == (str(error).split("\n")[0] or "RuntimeError")
    assert fix in str(refusal.fix)
