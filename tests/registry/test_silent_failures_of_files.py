"""Silent failures of files and of the Hub: what the tools of today do, run, and what lorary does.

Each test shows both sides and is a row of docs/reliability.md: see test_reliability.py.
"""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
row = pytest.mark.silent_failure


@row(
    "bytes of a safetensors file altered (100 files with one other bit each)",
    theirs="safetensors reads most of them",
    ours="0 accepted",
)
def test_altered_safetensors(refused_with: Any, saved: Path, whole: Any) -> None:

    from safetensors.torch import load

    from lorary.registry.compose.build import read_saved_packs

    path, draw, accepted = saved / "packs" / "cooking" / "adapter_model.safetensors", random.Random(1), 0
    plan, sound = whole.plan(str(saved)), path.read_bytes()
    for _ in range(100):
        place = draw.randrange(len(sound))
        altered = sound[:place] + bytes([sound[place] ^ (1 << draw.randrange(8))]) + sound[place + 1 :]
        path.write_bytes(altered)
        try:
            load(altered)
            accepted += 1
        except Exception:
            pass
        refused_with(5, lambda: read_saved_packs(saved, plan))

    assert accepted > 50


@row(
    "bytes of a FAISS index file altered (300 files)",
    theirs="faiss reads most of them",
    ours="packs have none, and no line of ours reads one",
)
def test_altered_faiss(saved: Path) -> None:

    import faiss
    import numpy as np

    index: Any = faiss.IndexFlatIP(8)
    index.add(np.random.default_rng(0).standard_normal((40, 8)).astype("float32"))
    sound, draw, accepted = faiss.serialize_index(index), random.Random(1), 0
    for _ in range(300):
        altered = sound.copy()
        altered[draw.randrange(len(sound))] ^= 1 << draw.randrange(8)
        try:
            faiss.deserialize_index(altered)
            accepted += 1
        except Exception:
            pass
    assert accepted > 150

    assert {path.suffix for path in saved.rglob("*") if path.is_file()} == {".json", ".safetensors"}
    root = Path(__file__).parents[2]
    sources = [p for part in ("adapters", "cli", "domains", "registry") for p in (root / part).rglob("*.py")]
    assert not [p for p in sources if "read_index" in p.read_text("utf-8") or "deserialize" in p.read_text("utf-8")]


# --- files ---

_SAVE = """
import sys
from peft import LoraConfig
targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
LoraConfig(r=4, target_modules=targets).save_pretrained(sys.argv[1])
from lorary.registry import Registry
Registry.open(sys.argv[2]).export("cooking", sys.argv[1] + "/ours", to="peft")
"""


@row(
    "the same adapter saved by two processes",
    theirs="PEFT writes another `adapter_config.json` (the order of a set)",
    ours="the same bytes",
)
def test_the_same_digest_in_every_process(tmp_path: Path, both_store: Path, peft: Any) -> None:
    seeds = ("1", "2")
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", _SAVE, str(tmp_path / seed), str(both_store)],
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
        for seed in seeds
    ]
    assert [run.wait(timeout=200) for run in runs] == [0, 0]

    theirs = {(tmp_path / seed / "adapter_config.json").read_bytes() for seed in seeds}
    ours = {tuple(path.read_bytes() for path in sorted((tmp_path / seed / "ours").iterdir())) for seed in seeds}
    assert len(theirs) > 1
    assert len(ours) == 1


@row(
    "a module that vLLM does not extend (Conv1D of GPT-2)",
    theirs="vLLM serves the bare base model (report: vllm#55193)",
    ours="`export --to vllm` refuses, exit 6",
)
def test_vllm_would_serve_the_bare_base(
    refused_with: Any, tiny_tokenizer: Any, texts: Any, short_run: Any, tmp_path: Path, logits_of: Any
) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    from lorary.registry import Registry

    base = tmp_path / "gpt2"
    shape: dict[str, Any] = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 512}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tiny_tokenizer), pad_token_id=0, **shape)).save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    registry = Registry.init(tmp_path / "store", base=str(base), data=[texts["general"]], **short_run())

    assert "Conv1D" in refused_with(6, lambda: registry.export("general", tmp_path / "out", to="vllm"))
    assert not (tmp_path / "out").exists()

    registry.export("general", tmp_path / "merged", to="merged")
    import torch

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits_of(merged), logits_of(registry.compose("general", static=True)), **CLOSE)


# --- the Hub ---

REPO = "acme/lorary-legal"


@row(
    "wrong bytes of the right size from the Hub",
    theirs="huggingface_hub takes them (hub#3643)",
    ours="fetched again; exit 5 if they stay wrong, and nothing is stored",
)
def test_wrong_bytes_of_the_right_size(refused_with: Any, ours: Any, local_hub: Any) -> None:
    from huggingface_hub import HfApi

    name = "adapter_model.safetensors"
    local_hub.fault("GET /[0-9a-f]{64}", "wrong", 700, times=1)
    wrong = Path(HfApi().hf_hub_download(REPO, name)).read_bytes()
    right = Path(HfApi().hf_hub_download(REPO, name, force_download=True)).read_bytes()
    assert len(wrong) == len(right)
    assert wrong != right

    local_hub.fault("GET /[0-9a-f]{64}", "wrong", 700, times=99)
    refused_with(5, lambda: ours.pull(REPO))
    assert ours.store.domains() == ["general"]
    local_hub.faults.clear()
    assert ours.pull(REPO).is_new


@row(
    "an interrupted download, then offline",
    theirs="`snapshot_download` gives the incomplete folder, without a warning",
    ours="exit 7; the same command goes on later",
)
def test_an_interrupted_download_then_offline(refused_with: Any, ours: Any, local_hub: Any) -> None:
    from huggingface_hub import snapshot_download

    local_hub.fault("HEAD .*/router/", "status", 503, times=99)
    refused_with(7, lambda: ours.pull(REPO))
    incomplete = Path(snapshot_download(REPO, local_files_only=True))
    assert not (incomplete / "router" / "router.json").exists()

    refused_with(7, lambda: ours.pull(REPO, offline=True))
    assert ours.store.domains() == ["general"]
    local_hub.faults.clear()
    assert ours.pull(REPO).is_new
