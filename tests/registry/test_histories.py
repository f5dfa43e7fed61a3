"""Random histories of a registry, compared step by step with a model of a few lines.

Versions are added, retrained, removed, restored, collected, renamed, exported and taken in again. Training itself is
left out: packs are ready-made, but the frozen proof is taken before and after each of them, as training does.
"""

import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from lorary.adapters.composition import GENERAL
from lorary.domains.errors import ConflictError, InputError, LoraryError, NotFoundError
from lorary.registry import Registry
from lorary.registry.interop.export_plan import export_archive
from lorary.registry.learn.proof import frozen_digests, prove
from lorary.registry.maintenance.verify import verify_store
from lorary.registry.store.blobs import sha256_of
from lorary.registry.store.gc import collect_garbage
from lorary.registry.store.manifest import MANIFEST_FILE, PackManifest
from lorary.registry.store.store import LATEST, Store

NAMES, TEXTS, ALIASES = ("legal", "tax"), ("one", "two", "three"), ("production", "staging")

names, texts = st.sampled_from(NAMES), st.sampled_from(TEXTS)
numbers = st.integers(1, 5)
selectors = st.one_of(st.none(), numbers.map(str), st.sampled_from((LATEST, *ALIASES)))


# --- the model ---


@dataclass
class Version:
    digest: str
    blobs: frozenset[str]
    is_held_back: bool
    removed: int = 0  # position among all removals; 0 for a version that is there


@dataclass
class Domain:
    versions: dict[int, Version] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)

    def live(self) -> list[int]:
        return sorted(number for number, version in self.versions.items() if not version.removed)

    def newest(self) -> int:
        return max(self.live(), key=lambda number: (not self.versions[number].is_held_back, number))

    def resolve(self, selector: str | None) -> int | None:
        """The version that a selector means, None where it means none."""
        selector = selector or LATEST
        number = int(selector) if selector.isdigit() else self.aliases.get(selector)
        if selector == LATEST and number is None and self.live():  # no commit has set it
            return self.newest()
        return number if number in self.live() else None

    def store(self, number: int, version: Version, *, alias: str | None) -> None:
        self.versions[number] = version
        self.restore(number, alias=alias)

    def remove(self, number: int, *, order: int) -> None:
        self.versions[number].removed = order
        self.mend_latest()

    def restore(self, number: int, *, alias: str | None = None) -> None:
        self.versions[number].removed = 0
        if alias and self.aliases.get(alias, 0) < number:
            self.aliases[alias] = number
        self.mend_latest()

    def mend_latest(self) -> None:
        """`latest` never points to a removed version where another is left."""
        if self.live() and self.aliases.get(LATEST, self.live()[0]) not in self.live():
            self.aliases[LATEST] = self.newest()

    def missing(self, number: int, blobs: set[str]) -> frozenset[str]:
        return self.versions[number].blobs - blobs


# --- the machine ---


@dataclass(frozen=True)
class Material:
    """What all histories share: it is made once, and only read."""

    start: Path  # a store with the KP bank alone
    pattern: PackManifest
    files: dict[str, Any]  # by text: the files of a pack
    base: Any
    composed: Any  # the model whose experts are frozen while a domain is trained
    folder: Path


class RegistryHistory(RuleBasedStateMachine):
    """A registry beside its model; each rule does the same to both."""

    def __init__(self, material: Material):
        super().__init__()
        self.material = material
        self.folder = material.folder / "store"
        self.store = Store.open(shutil.copytree(material.start, self.folder))
        self.registry = Registry(self.store)
        self.kp = self.store.manifest(GENERAL)
        self.model = {name: Domain() for name in NAMES}
        self.blobs = set(self.store.blobs.all())
        self.removals = 0
        self.archives: list[Path] = []

    def teardown(self) -> None:
        self.check_files()
        shutil.rmtree(self.material.folder)
        self.material.folder.mkdir()

    @contextmanager
    def refused(self, kind: type[LoraryError] | None) -> Iterator[None]:
        """Expect this error; None expects success."""
        if kind is None:
            yield
        else:
            with pytest.raises(kind):
                yield

    # --- versions come ---

    @rule(name=names, text=texts)
    def add(self, name: str, text: str) -> None:
        with self.refused(ConflictError if self.model[name].live() else None):
            self.train(name, text, first_only=True)

    @rule(name=names, text=texts, selector=selectors, holds=st.booleans(), meanwhile=st.booleans())
    def retrain(self, name: str, text: str, selector: str | None, *, holds: bool, meanwhile: bool) -> None:
        number = self.model[name].resolve(selector)
        with self.refused(None if number else NotFoundError):
            parent = self.store.manifest(name, selector)
            assert parent.version == number
            lineage = {"parent": {"version": parent.version, "digest": parent.digest}, "mode": "fresh"}
            evaluation = {} if holds else {"gate": {"holds": False}}
            self.train(name, text, lineage=lineage, evaluation=evaluation, meanwhile=meanwhile)

    def train(self, name: str, text: str, *, first_only: bool = False, meanwhile: bool = False, **changes: Any) -> None:
        """Store a version as training does, with the frozen proof."""
        domain = self.model[name]
        before = frozen_digests(self.material.base, self.material.composed, self.store)
        expected = {f"{GENERAL}@1"} | {
            f"{other}@{number}" for other, one in self.model.items() for number in one.versions
        }
        assert before.store.versions.keys() == expected
        if meanwhile:  # a colleague tidies up while this trains
            self.remove("tax", "1")
            self.collect()
        proof = prove(before, frozen_digests(self.material.base, self.material.composed, self.store))
        draft = replace(self.material.pattern, name=name, description=text, proof=proof, **changes)
        files = self.material.files[text]
        self.blobs |= {sha256_of(data) for data, _kind in files.values()}  # a refused commit leaves them for gc
        alias = None if draft.is_held_back else LATEST
        manifest = self.store.commit(draft, files, first_only=first_only, alias=alias)
        assert manifest.version == max(domain.versions, default=0) + 1
        self.note(manifest, alias=alias)

    def note(self, manifest: PackManifest, *, alias: str | None) -> None:
        blobs = frozenset(file.sha256 for file in manifest.files)
        version = Version(manifest.digest, blobs, manifest.is_held_back)
        self.model[manifest.name].store(manifest.version, version, alias=alias)

    # --- versions go and come back ---

    @rule(name=names, selector=selectors)
    def remove(self, name: str, selector: str | None) -> None:
        domain = self.model[name]
        number = domain.resolve(selector)
        is_held = any(version == number for alias, version in domain.aliases.items() if alias != LATEST)
        with self.refused(ConflictError if number and is_held else None if number else NotFoundError):
            assert self.registry.remove(reference(name, selector)).version == number
            self.removals += 1
            domain.remove(number or 0, order=self.removals)

    @rule(name=names, number=st.none() | numbers)
    def restore(self, name: str, number: int | None) -> None:
        domain = self.model[name]
        if number is None:
            removed = {version.removed: at for at, version in domain.versions.items() if version.removed}
            number = removed[max(removed)] if removed else 0
            selector = None
        else:
            selector = str(number)
        if number in domain.live():
            error: type[LoraryError] | None = ConflictError
        else:
            is_there = number in domain.versions and not domain.missing(number, self.blobs)
            error = None if is_there else NotFoundError
        with self.refused(error):
            assert self.registry.restore(reference(name, selector)).version == number
            domain.restore(number)

    @rule()
    def collect(self) -> None:
        needed = {blob for domain in self.model.values() for n in domain.live() for blob in domain.versions[n].blobs}
        needed |= {file.sha256 for file in self.kp.files}

        found = collect_garbage(self.store, grace_s=0)

        assert set(found.blobs) == self.blobs - needed
        self.blobs &= needed

    # --- names ---

    @rule(name=names, alias=st.sampled_from((LATEST, *ALIASES)), number=numbers)
    def set_alias(self, name: str, alias: str, number: int) -> None:
        domain = self.model[name]
        with self.refused(None if number in domain.live() else NotFoundError):
            self.store.set_alias(name, alias, number)
            domain.aliases[alias] = number

    @rule(name=names, alias=st.sampled_from((LATEST, *ALIASES)))
    def drop_alias(self, name: str, alias: str) -> None:
        domain = self.model[name]
        is_there = alias in domain.aliases
        with self.refused(InputError if alias == LATEST else None if is_there else NotFoundError):
            self.store.drop_alias(name, alias)
            del domain.aliases[alias]

    # --- packs go out and come in ---

    @rule(name=names, selector=selectors)
    def export(self, name: str, selector: str | None) -> None:
        number = self.model[name].resolve(selector)
        with self.refused(None if number else NotFoundError):
            manifest = self.store.manifest(name, selector)
            out = self.material.folder / f"{len(self.archives)}.tar"
            export_archive(self.store, manifest, out)
            self.archives.append(out)

    @precondition(lambda self: self.archives)
    @rule(data=st.data(), alias=st.sampled_from((None, LATEST)), other_name=st.none() | names)
    def take_in(self, data: Any, alias: str | None, other_name: str | None) -> None:
        """Store what was exported, as pull does: missing files first, then the manifest."""
        manifest, files = unpack(data.draw(st.sampled_from(self.archives)))
        manifest = replace(manifest, name=other_name or manifest.name)
        for file in manifest.files:
            assert self.store.blobs.put(files[file.path]) == file.sha256
        self.blobs |= {file.sha256 for file in manifest.files}
        domain = self.model[manifest.name]
        same = [number for number, version in sorted(domain.versions.items()) if version.digest == manifest.digest]
        live = [number for number in same if number in domain.live()]

        adopted = self.store.adopt(manifest, alias=alias)

        if same:
            number = (live or same)[0]
            assert adopted.version == number
            if not live:
                domain.restore(number, alias=alias)
        else:
            is_free = manifest.version not in domain.versions
            assert adopted.version == (manifest.version if is_free else max(domain.versions) + 1)
            self.note(adopted, alias=alias)

    # --- what must hold after every step ---

    @rule(data=st.data(), name=names, selector=selectors)
    def plan(self, data: Any, name: str, selector: str | None) -> None:
        others = [one for one in NAMES if one != name and self.model[one].live()]
        chosen = data.draw(st.sampled_from([*others, None]))
        number = self.model[name].resolve(selector)
        with self.refused(None if number else NotFoundError):
            plan = self.registry.plan("+".join(filter(None, [reference(name, selector), chosen])))
            expected = {GENERAL: 1, name: number} | ({chosen: self.model[chosen].resolve(None)} if chosen else {})
            assert {slot.name: slot.manifest.version for slot in plan.slots} == expected

    @rule()
    def check_files(self) -> None:
        found = list(verify_store(self.store))
        live = {f"{name}@{number}" for name, domain in self.model.items() for number in domain.live()}
        assert {one.reference for one in found} == live | {f"{GENERAL}@1"}
        assert {one.state for one in found} == {"ok"}

    @invariant()
    def is_as_the_model(self) -> None:
        known = {name: domain for name, domain in self.model.items() if domain.versions}
        assert self.store.domains(removed=True) == sorted([GENERAL, *known])
        assert self.store.domains() == sorted([GENERAL, *(name for name in known if known[name].live())])
        assert set(self.store.blobs.all()) == self.blobs
        for name, domain in known.items():
            assert self.store.versions(name) == domain.live()
            assert self.store.removed(name).keys() == domain.versions.keys() - set(domain.live())
            stored = {manifest.version: manifest.digest for manifest in self.store.history(name)}
            assert stored == {number: version.digest for number, version in domain.versions.items()}
            assert self.store.aliases(name) == domain.aliases
            if domain.live():
                assert self.store.manifest(name).version == domain.resolve(None)


def reference(name: str, selector: str | None) -> str:
    return name if selector is None else f"{name}@{selector}"


def unpack(archive: Path) -> tuple[PackManifest, dict[str, bytes]]:
    with tarfile.open(archive) as tar:
        members = {member.name.partition("/")[2]: tar.extractfile(member) for member in tar}
        files = {path: file.read() for path, file in members.items() if file}
    return PackManifest.from_json(files.pop(MANIFEST_FILE), source=str(archive)), files


@pytest.fixture
def material(kp_store: Path, cooking_store: Path, rescaled: Any, tmp_path: Path, monkeypatch: Any) -> Material:
    registry = Registry.open(kp_store)
    # power cuts are tested elsewhere, and waiting for the disk takes nine tenths of the time
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    (tmp_path / "history").mkdir()
    return Material(
        start=kp_store,
        pattern=replace(Store.open(cooking_store).manifest("cooking"), files=(), version=0),
        files={text: rescaled(text) for text in TEXTS},
        base=registry.base.model,
        composed=registry.compose(GENERAL),
        folder=tmp_path / "history",
    )


@pytest.fixture
def run_histories(material: Material) -> Callable[[int], None]:
    def run(count: int) -> None:
        chosen = settings(
            max_examples=count,
            stateful_step_count=15,
            deadline=None,
            suppress_health_check=list(HealthCheck),  # type: ignore[arg-type]
        )
        factory: Any = lambda: RegistryHistory(material)  # noqa: E731
        run_state_machine_as_test(factory, settings=chosen)

    return run


def test_any_history_is_that_of_the_model(run_histories: Callable[[int], None]) -> None:
    run_histories(100)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_many_histories_are_those_of_the_model(run_histories: Callable[[int], None]) -> None:
    run_histories(2000)
