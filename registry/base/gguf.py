"""Read a GGUF file of a Llama model, and write it as an ordinary transformers folder: the same bytes on every machine.

transformers can read GGUF files too, but what it writes depends on its version and needs another package. A named base
has to have the same digests everywhere. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ...domains.errors import IntegrityError

TOKENIZER_FILE, TEMPLATE_FILE, WEIGHTS_FILE = "tokenizer.json", "chat_template.jinja", "model.safetensors"
_BLOCK: Final = 32  # weights that share a scale
_TEXT, _LIST = 8, 9
_NUMBERS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_CONTROL, _NORMAL = 3, 1  # types of tokens
_MODULES: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True)
class GgufFile:
    """Metadata and raw tensors of a GGUF file."""

    values: Mapping[str, Any]
    tensors: Mapping[str, tuple[tuple[int, ...], int, memoryview]]  # shape, type, bytes from there on


def convert_gguf(path: Path, folder: Path) -> None:
    """Write weights in bfloat16, tokenizer and chat template of a Llama model into a folder, without any config.

    Raises:
        IntegrityError: The file is not of this format, or of a kind that is not read here.
    """
    try:
        file = read_gguf(path.read_bytes())
        (folder / TOKENIZER_FILE).write_bytes(_tokenizer(file.values))
        (folder / TEMPLATE_FILE).write_bytes(file.values["tokenizer.chat_template"].encode())
        heads = (file.values["llama.attention.head_count"], file.values["llama.attention.head_count_kv"])
        weights = {_name(name): _tensor(name, *given, heads).bfloat16() for name, given in file.tensors.items()}
        save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    except (KeyError, ValueError, struct.error) as error:
        raise IntegrityError(f"{path.name} cannot be converted.", cause=f"{type(error).__name__}: {error}") from error


def read_gguf(data: bytes) -> GgufFile:
    """Read metadata and places of tensors.

    Raises:
        ValueError, struct.error: It is no GGUF file.
    """
    reader = _Reader(memoryview(data))
    if bytes(reader.take(4)) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version, tensors, values = reader.number("I"), reader.number("Q"), reader.number("Q")
    if version != 3:
        raise ValueError(f"version {version}, not 3")
    found = {reader.text(): reader.value(reader.number("I")) for _ in range(values)}
    infos = []
    for _ in range(tensors):
        name, axes = reader.text(), reader.number("I")
        shape = tuple(reversed([reader.number("Q") for _ in range(axes)]))  # the fastest axis stands first
        infos.append((name, shape, reader.number("I"), reader.number("Q")))
    aligned = int(found.get("general.alignment", 32))
    begin = -(-reader.at // aligned) * aligned
    return GgufFile(found, {name: (shape, kind, reader.data[begin + at :]) for name, shape, kind, at in infos})


class _Reader:
    def __init__(self, data: memoryview):
        self.data, self.at = data, 0

    def take(self, count: int) -> memoryview:
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(kind)))[0]

    def text(self) -> str:
        return bytes(self.take(self.number("Q"))).decode()

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind == _LIST:
            kind, count = self.number("I"), self.number("Q")
            return [self.value(kind) for _ in range(count)]
        return self.number(_NUMBERS[kind])


# --- weights ---


def _name(name: str) -> str:
    """Return the name in transformers of a tensor such as `blk.3.attn_q.weight`."""
    part, _, suffix = name.rpartition(".")
    if part.startswith("blk."):
        _, layer, module = part.split(".")
        return f"model.layers.{layer}.{_MODULES[module]}.{suffix}"
    return f"{_OUTSIDE[part]}.{suffix}"


def _tensor(name: str, shape: tuple[int, ...], kind: int, data: memoryview, heads: tuple[int, int]) -> Tensor:
    """Return a weight in float32, as transformers orders it."""
    if kind not in _FORMATS:
        raise ValueError(f"{name}: quantisation {kind} is not read here")
    size, read = _FORMATS[kind]
    count = int(np.prod(shape))
    values = read(np.frombuffer(data[: count // _BLOCK * size] if kind else data[: count * 4], np.uint8))
    weight = values.reshape(shape)
    for module, of_module in zip(("attn_q", "attn_k"), heads, strict=True):
        if f".{module}." in name:  # rotary embeddings pair neighbours there, and halves here
            weight = weight.reshape(of_module, -1, 2, shape[-1]).swapaxes(1, 2).reshape(shape)
    return torch.from_numpy(np.array(weight, np.float32, order="C"))  # a copy: the file's bytes cannot be written to


def _f32(data: np.ndarray) -> np.ndarray:
    return data.view("<f4")


def _q4_1(data: np.ndarray) -> np.ndarray:
    """Blocks of scale, minimum, and 32 numbers of 4 bits: the low halves of 16 bytes, then the high ones."""
    blocks = data.reshape(-1, 20)
    scale, least = (blocks[:, at : at + 2].copy().view("<f2").astype(np.float32) for at in (0, 2))
    numbers = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return scale * numbers.astype(np.float32) + least


def _q8_0(data: np.ndarray) -> np.ndarray:
    """Blocks of scale and 32 numbers of 8 bits."""
    blocks = data.reshape(-1, 34)
    return blocks[:, :2].copy().view("<f2").astype(np.float32) * blocks[:, 2:].view(np.int8).astype(np.float32)


# by type: bytes of a block of 32, and how it is read
_FORMATS: Final[dict[int, tuple[int, Callable[[np.ndarray], np.ndarray]]]] = {
    0: (4 * _BLOCK, _f32),
    3: (20, _q4_1),
    8: (34, _q8_0),
}


# --- tokenizer ---


def _tokenizer(values: Mapping[str, Any]) -> bytes:
    """Return the tokenizer.json of a byte-level BPE, as the library tokenizers formats it."""
    if values["tokenizer.ggml.model"] != "gpt2":
        raise ValueError(f"a tokenizer of kind {values['tokenizer.ggml.model']}")
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    if not {*kinds} <= {_CONTROL, _NORMAL}:
        raise ValueError(f"tokens of types {sorted({*kinds})}")
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **plain, "special": True}
            for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind == _CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": _byte_level(add_prefix_space=False),
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_sequence("A", 0)],
            "pair": [_sequence("A", 0), _sequence("B", 1)],
            "special_tokens": {},
        },
        "decoder": _byte_level(add_prefix_space=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [pair.split(" ") for pair in values["tokenizer.ggml.merges"]],
        },
    }
    return json.dumps(content, ensure_ascii=False, indent=2).encode()


def _sequence(name: str, kind: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": kind}}


def _byte_level(*, add_prefix_space: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": True, "use_regex": True}
