"""Time to compose 16 experts from a store, against 16 `load_adapter` calls of PEFT and reading the same bytes.

    OMP_NUM_THREADS=1 python tests/benchmarks/compose.py [--stored 8,24] [--checks] [--out compose.json]

The base has about 100 M random parameters, each pack two experts of rank 8 on all linears of every layer. Files are in
the page cache. `cold` reads, verifies and stacks packs and caches the result; `warm` reads the cache. With `--checks`,
`warm` is measured with different checksums of the cached file instead.
"""

import argparse
import copy
import hashlib
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import models
import torch
from peft import PeftModel
from timing import report

from lorary.domains.base_model import find_layout
from lorary.registry.compose import cache
from lorary.registry.compose.build import compose_model
from lorary.registry.compose.plan import plan_composition
from lorary.registry.pack.pack import DomainPack, expert_records, pack_files
from lorary.registry.store.blobs import sha256_of
from lorary.registry.store.manifest import BaseRecord, PackManifest
from lorary.registry.store.store import Store

torch.set_num_threads(1)
BASE = BaseRecord(
    id="random",
    revision=None,
    architecture="LlamaForCausalLM",
    weights=sha256_of(b"weights"),
    tokenizer=sha256_of(b"tokenizer"),
    chat_template=None,
    dtype="float32",
)
COMPOSED = 8  # slots, of two experts each


class Base:
    """The part of a loaded base that `compose_model` needs."""

    def __init__(self, model: Any):
        self.model = model
        self.layout = find_layout(model)


def fill(store: Store, base: Base, packs: int) -> None:
    """Commit packs until the store has `packs` domains."""
    stack = models.make_stack(base.model, slots=2, experts=2)
    statistics = models.make_statistics(2)
    for number in range(len(store.domains()), packs):
        bank = copy.deepcopy(stack.banks[number % 2])
        for _, tensor in bank.tensors():
            tensor.add_(1e-3 * number)
        pack = DomainPack(
            bank=bank,
            statistics=statistics[number % 2],
            prototypes=torch.eye(16, models.WIDTH),
            temperatures=models.Temperatures(),
            feature_layer=0,
        )
        name = "general" if number == 0 else f"d{number}"
        draft = PackManifest(
            name=name,
            role="preservation" if number == 0 else "domain",
            description="",
            license="",
            base=BASE,
            experts=expert_records(bank),
            allocation={"schedule": "uniform", "counts": list(bank.counts(base.layout.count))},
            lineage={},
            train={},
            evaluation={},
            proof={},
            created="2026-01-01T00:00:00+00:00",
            tool={},
        )
        store.commit(draft, pack_files(pack, layout=base.layout, base_id="random", revision=None))


def seconds(run: Callable[[], Any], *, rounds: int) -> float:
    """Return the lower quartile of the thread's CPU time."""
    times = []
    for _ in range(rounds):
        began = time.thread_time()
        run()
        times.append(time.thread_time() - began)
    return sorted(times)[len(times) // 4]


def sha256(long: Mapping[str, torch.Tensor], document: str) -> str:
    """Return the sha256 of the same bytes."""
    digest = hashlib.sha256(document.encode())
    for name in sorted(long):
        digest.update(long[name].numpy().data)
    return digest.hexdigest()


def crc32(long: Mapping[str, torch.Tensor], document: str) -> str:
    """Return the CRC-32 of the same bytes."""
    value = zlib.crc32(document.encode())
    for name in sorted(long):
        value = zlib.crc32(long[name].numpy().data, value)
    return str(value)


def compare_checks(compose: Callable[[], Any], folder: Path) -> list[dict[str, Any]]:
    """Time composing from the cache with different checksums of the cached file, in turns."""
    checks = {"sums of words": cache.checksum, "sha256": sha256, "CRC-32": crc32, "none": lambda _long, _document: ""}
    times: dict[str, list[float]] = {name: [] for name in checks}
    for _ in range(3):
        for name, check in checks.items():
            cache.checksum = check
            shutil.rmtree(folder, ignore_errors=True)
            compose()
            times[name].append(seconds(compose, rounds=15))
    cache.checksum = checks["sums of words"]
    return [{"check": name, "warm ms": min(found) * 1e3} for name, found in times.items()]


def load_with_peft(base: Any, paths: list[str]) -> None:
    model = PeftModel.from_pretrained(base, paths[0], adapter_name="e0")
    for number, path in enumerate(paths[1:], 1):
        model.load_adapter(path, adapter_name=f"e{number}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stored", type=lambda text: [int(part) for part in text.split(",")], default=[8, 24])
    parser.add_argument("--without-peft", action="store_true")
    parser.add_argument("--checks", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    base: Any = Base(models.make_base())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        store = Store.create(Path(folder) / "store", {})
        for stored in args.stored:
            fill(store, base, stored)
            text = "+".join(f"d{number}" for number in range(1, COMPOSED))

            def compose(text: str = text) -> Any:
                return compose_model(store, plan_composition(store, text, base=BASE), base)

            if args.checks:
                rows += compare_checks(compose, store.cache / "compositions")
                continue
            shutil.rmtree(store.cache / "compositions", ignore_errors=True)
            cold = seconds(compose, rounds=1)
            file = cache.CompositionCache(store.cache).path(plan_composition(store, text, base=BASE), torch.float32)
            warm, read = [], []
            for _ in range(3):  # interleaved
                warm.append(seconds(compose, rounds=7))
                read.append(seconds(file.read_bytes, rounds=7))
            row = {
                "stored packs": stored,
                "experts": 2 * COMPOSED,
                "MB": file.stat().st_size / 2**20,
                "cold ms": cold * 1e3,
                "warm ms": min(warm) * 1e3,
                "file read ms": min(read) * 1e3,
                "warm / read": min(warm) / min(read),
            }
            rows.append(row)
        if not (args.without_peft or args.checks):
            paths = models.saved_adapters(base.model, 2 * COMPOSED, Path(folder) / "adapters")
            peft = seconds(lambda: load_with_peft(copy.deepcopy(base.model), paths), rounds=1)
            rows[-1] |= {"PEFT ms": peft * 1e3, "PEFT / warm": peft * 1e3 / rows[-1]["warm ms"]}
    report("Composing 16 experts", rows, args.out)


if __name__ == "__main__":
    main()
