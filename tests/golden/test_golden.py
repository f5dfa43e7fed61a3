"""What releases have written is read, computed with and written again as it was; README.md says what is compared."""

import hashlib
import importlib.util
import json
import math
import shlex
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from safetensors.numpy import load_file

from lorary.registry import Registry

# the one place that knows files inside the program
from lorary.registry.pack.pack import pack_files, read_pack

HERE = Path(__file__).parent
RELEASES = sorted(HERE.glob("v*"))
# texts for people; the size of the model card is that of one
PROSE = {"title", "formula", "source", "meaning", "message", "cause", "fix", "card"}
# what no two runs share: times, and the commits that a Hub makes of them
PASSING = {"created", "time", "updated", "removed", "seconds", "commit"}
# what a run from the beginning shares with the release, beside numbers, names and sizes; and what is below it
UNTRAINED = {"base", "weights", "tokenizer", "chat_template", "architecture", "data", "imported"}
# ratios of small numbers, by a router that reads texts in another way since
ROUTED = {"share_interval", "share_of_oracle_gain", "routed_right", "similarity"}
# sizes of what is held out, where rows that are nearly the same are held out together since
SPLIT = {("scores", "bytes"), ("data", "held_out"), ("evaluation", "bytes")}
TRAINED = PASSING | {"tool", "description"}
# keys of documents and manifests that came after a release: programs that read the older ones pass over them
ADDED = {
    "init": {"adaptable", "dtype", "scores.share_reason", "proof.frozen.store"},
    "add-domain": {"chat_probe", "held_out", "proof.chat", "scores.share_reason", "proof.frozen.store"},
    "retrain": {
        *("chat_probe", "failing_kinds", "held_out", "proof.chat", "scores.share_reason", "proof.frozen.store")
    },
    "import": {"chat_probe", "routing", "near_duplicate", "scores.share_reason"},
    "verify": {"unsealed"},
    "gc": {"unreadable"},
    "route": {"left_out"},
    "generate": {"finish"},
    "compose": {"answer.finish"},
    "report": {"changes", "kinds", "figures.*.reason", "figures.*.domains.*.reason", "gates.*.reasons"},
    "evaluate": {"domains.*.share_reason"},
    "show": {"manifest.evaluation.share_reason"},
    "manifest": {
        *("proof.chat", "base.template_tokens", "train.dtype", "evaluation.share_reason", "proof.frozen.store"),
        "base.tokenizer_settings",
        *("train.settings.validation", "train.settings.patience"),
        *(f"train.data.{key}" for key in ("split", "documents", "held_out_documents", "held_out_digest", "problems")),
    },
}
# keys that a release wrote and later programs do not; they are read all the same
GONE = {"proof.frozen.packs"}  # named every stored version
# shares of gains that are noise: numbers once, since then null with a reason
WITHDRAWN = {"value", "interval", "share_of_oracle_gain", "share_interval"}
# these commands made plain text of a prompt; later ones a turn of the base's chat template, but with --raw
RAW = {"compose-prompt", "generate", "generate-sampled", "route", "route-in"}
RAW |= {"init", "add-cooking", "add-sailing", "retrain-extend", "retrain-continue", "retrain-fresh", "import"}


def load_maker() -> Any:
    spec = importlib.util.spec_from_file_location("golden_make", HERE / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GOLDEN = load_maker()


def commands(release: Path, phase: str) -> list[dict[str, Any]]:
    every = json.loads((release / "commands.json").read_text(encoding="utf-8"))
    return [command for command in every if command["phase"] == phase]


def of_phase(phase: str) -> list[Any]:
    return [
        pytest.param(release, command, id=f"{release.name}-{command['name']}")
        for release in RELEASES
        for command in commands(release, phase)
    ]


@pytest.fixture(scope="module", params=RELEASES, ids=lambda release: release.name)
def release(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """`laid_out(release)` is a folder with a copy of it, which tests only read."""
    folders: dict[Path, Path] = {}

    def lay(release: Path) -> Path:
        if release not in folders:
            folders[release] = tmp_path_factory.mktemp(release.name)
            GOLDEN.lay_out(release, folders[release])
        return folders[release]

    return lay


@pytest.fixture
def copied(tmp_path: Path, release: Path) -> Iterator[Path]:
    """A copy of the release in which we stand, and which the test may change."""
    work = tmp_path / "work"
    GOLDEN.lay_out(release, work)
    with GOLDEN.standing_in(work):
        yield work


# --- comparing documents ---


def differences(
    found: Any, kept: Any, *, same: Callable[[Any, Any, tuple[str, ...]], bool], at: tuple = ()
) -> list[str]:
    """Where two documents differ in keys, their order, types or values."""
    where = ".".join(map(str, at)) or "the document"
    if is_withdrawn(found, at):
        return []
    if type(found) is not type(kept):
        return [f"{where}: {found!r} was {kept!r}"]
    if isinstance(kept, dict):
        if list(found) != list(kept):
            return [f"{where}: keys {list(found)} were {list(kept)}"]
        pairs = [((*at, key), found[key], kept[key]) for key in kept]
    elif isinstance(kept, list):
        if len(found) != len(kept):
            return [f"{where}: {len(found)} values were {len(kept)}"]
        pairs = [((*at, str(place)), *pair) for place, pair in enumerate(zip(found, kept, strict=True))]
    else:
        return [] if same(found, kept, at) else [f"{where}: {found!r} was {kept!r}"]
    return [problem for place, one, other in pairs for problem in differences(one, other, same=same, at=place)]


def is_withdrawn(found: Any, at: tuple[str, ...]) -> bool:
    """Whether it is a share of noise, which is given no more."""
    return found is None and (not WITHDRAWN.isdisjoint(at[-1:]) or at[-2:-1] == ("failed",))


def same_value(found: Any, kept: Any, at: tuple[str, ...]) -> bool:
    """Equal, but for prose and the last bits of floats."""
    if isinstance(kept, float):
        return math.isclose(found, kept, rel_tol=1e-4, abs_tol=1e-4)
    return found == kept or at[-1] in PROSE


def same_on_the_hub(found: Any, kept: Any, at: tuple[str, ...]) -> bool:
    """The same, but for what a Hub makes: commits and times; and the size of the model card."""
    return at[-1] in PASSING or (at[-1] == "size" and at[0] == "files") or same_value(found, kept, at)


def same_but_trained(found: Any, kept: Any, at: tuple[str, ...]) -> bool:
    """About equal, but for digests of what was trained; digests of all else are equal."""
    if TRAINED.intersection(at) or at[-1] in PROSE or at[-2:] in SPLIT:
        return True
    if isinstance(kept, float):
        return ROUTED.intersection(at) != set() or math.isclose(found, kept, rel_tol=0.05, abs_tol=0.05)
    if at[-1] == "run":  # named by the digest of the parent
        return found.rpartition("-")[0] == kept.rpartition("-")[0]
    is_digest = isinstance(kept, str) and kept.startswith("sha256:")
    return found == kept or (is_digest and found.startswith("sha256:") and not UNTRAINED.intersection(at))


def check_printed(release: Path, command: dict[str, Any], *, same: Callable[..., bool] = same_value) -> None:
    """Runs a command where we stand: it ends and prints as it did."""
    words = shlex.split(command["words"])
    printed = GOLDEN.run([*words, "--raw"] if command["name"] in RAW else words)
    kept = (release / "printed" / f"{command['name']}.json").read_text(encoding="utf-8")

    assert printed.exit == command["exit"], printed.stderr
    assert not differences({"error": printed.error}, {"error": command.get("error")}, same=same)
    assert bool(printed.stdout) == bool(kept)
    if kept:
        found, before = json.loads(printed.stdout), json.loads(kept)
        drop_means(found, before)
        drop_added(found, before, found.get("command"))
        assert not differences(found, before, same=same)


def drop_means(found: dict[str, Any], before: dict[str, Any]) -> None:
    """Delete the means of shares of which one is withdrawn: they are those of the others."""
    for name, figure in found.get("figures", {}).items():
        if any("reason" in value for value in figure["domains"].values()):
            for one in (figure, before["figures"][name]):
                one["value"] = one["interval"] = None


def drop_added(found: dict[str, Any], before: dict[str, Any], kind: str) -> None:
    """Delete the keys that a release did not write yet, and those that are not written any more."""
    for path in ADDED.get(kind, set()):
        _drop(found, before, path.split("."))
    for path in GONE:
        _drop(before, found, path.split("."))


def _drop(ours: Any, theirs: Any, path: list[str]) -> None:
    key, *rest = path
    if isinstance(ours, list):
        ours, theirs = ({str(i): one for i, one in enumerate(many)} for many in (ours, theirs))
    if not rest:
        if key not in theirs:
            ours.pop(key, None)
        return
    for name in list(ours) if key == "*" else [key]:
        _drop(ours.get(name) or {}, theirs.get(name) or {}, rest)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what is stored ---


def test_every_version_is_read_and_has_its_digests(release, laid_out):
    kept = json.loads((release / "digests.json").read_text(encoding="utf-8"))

    with GOLDEN.standing_in(laid_out(release)):
        assert GOLDEN.digests_of("store") == kept


def test_every_version_is_written_again_as_the_same_bytes(release, laid_out):
    with GOLDEN.standing_in(laid_out(release)):
        registry = Registry.open("store")
        base, layout = registry.base_record, registry.base.layout
        for name in registry.store.domains(removed=True):
            for manifest in registry.store.history(name):
                written = Path(f"store/domains/{name}/{manifest.version}.json").read_bytes()
                assert type(manifest).from_json(manifest.to_json(), source=name) == manifest
                assert manifest.to_json() == written

                pack = read_pack(registry.store, manifest)
                files = pack_files(pack, layout=layout, base_id=base.id, revision=base.revision)
                found = {
                    path: (f"sha256:{hashlib.sha256(data).hexdigest()}", kind) for path, (data, kind) in files.items()
                }
                assert found == {file.path: (file.sha256, file.kind) for file in manifest.files}


def test_a_release_names_no_folder_of_the_machine_that_made_it(release):
    words = [b"/tmp", b"/home", b"/root", b"/work", b"/Users", b":\\\\"]
    files = tree(release) | {f"inputs/{path}": data for path, data in tree(GOLDEN.INPUTS).items()}

    assert not [path for path, data in files.items() if any(word in data for word in words)]


# --- what commands say of it ---


@pytest.mark.parametrize(("release", "command"), of_phase("looking"))
def test_a_command_prints_what_it_printed(release, command, laid_out):
    with GOLDEN.standing_in(laid_out(release)):
        check_printed(release, command)


def test_composed_models_compute_what_they_computed(release, laid_out):
    with GOLDEN.standing_in(laid_out(release)):
        for kept in json.loads((release / "logits.json").read_text(encoding="utf-8")):
            found = GOLDEN.logits_of(kept["composition"], static=kept["static"])
            assert found == pytest.approx(kept["logits"], rel=1e-4, abs=1e-4), kept["composition"]


# --- what leaves a store, and comes back ---


def test_what_is_saved_and_exported_is_the_same_again(release, copied):
    shutil.rmtree(copied / "saved")
    shutil.rmtree(copied / "exports")

    for command in commands(release, "making"):
        if command["words"].startswith(("export", "compose")):
            check_printed(release, command)

    assert tree(copied / "saved") == tree(release / "saved")
    found, kept = tree(copied / "exports"), tree(release / "exports")
    assert sorted(found) == sorted(kept)
    for path in kept:
        if path.endswith(".safetensors"):
            check_tensors(copied / "exports" / path, release / "exports" / path, only="")
        else:
            assert found[path] == kept[path], path


def test_an_exported_adapter_computes_the_same_as_a_domain_of_its_own(release, copied):
    (kept,) = [
        one["logits"]
        for one in json.loads((release / "logits.json").read_text(encoding="utf-8"))
        if one["composition"] == "cooking@1" and one["static"]
    ]

    Registry.open("store").import_adapter("again", "exports/cooking", data=["data/cooking.jsonl"], same_base=True)

    assert GOLDEN.logits_of("again", static=True) == pytest.approx(kept, rel=1e-4, abs=1e-4)


def test_packs_go_to_the_hub_and_back(release, copied, local_hub):
    for command in commands(release, "hub"):
        check_printed(release, command, same=same_on_the_hub)

    with tarfile.open("exports/notes.tar") as archive:
        archive.extractall("unpacked", filter="data")
    HfApi().create_repo("acme/lorary-notes")
    HfApi().upload_folder(repo_id="acme/lorary-notes", folder_path="unpacked/notes")
    assert GOLDEN.run(["pull", "acme/lorary-notes", "--store", "fresh"]).exit == 0

    kept, found = GOLDEN.digests_of("store"), GOLDEN.digests_of("fresh")
    assert found["cooking@2"] == kept["cooking@2"]
    assert found["notes@1"] == kept["notes@1"]


# --- from the beginning ---


@pytest.mark.parametrize("last", ["add-sailing", pytest.param("", marks=pytest.mark.slow, id="all")])
def test_the_same_commands_make_the_same_but_for_trained_numbers(release, last, tmp_path):
    made, kept, versions = tmp_path / "store", release / "store", 0
    GOLDEN.lay_out(None, tmp_path)
    with GOLDEN.standing_in(tmp_path):
        for command in commands(release, "making"):
            check_printed(release, command, same=same_but_trained)
            versions += command["words"].startswith(("init", "add-domain", "retrain", "import"))
            if command["name"] == last:
                break

    manifests = sorted(path.relative_to(made) for path in made.glob("domains/*/*.json"))
    assert len(manifests) == versions
    for path in manifests:
        found, was = json.loads((made / path).read_bytes()), json.loads((kept / path).read_bytes())
        drop_added(found, was, "manifest")
        is_one_edition = schema_of(made, found) == schema_of(kept, was)
        if not is_one_edition:
            for file in (*found["files"], *was["files"]):
                file["size"] = 0 if file["path"].startswith("router/") else file["size"]
        assert not differences(found, was, same=same_but_trained), path
        for file, before in zip(found["files"], was["files"], strict=True):
            is_of_edition = file["path"].startswith("router/") and not is_one_edition
            assert file == before or not file["path"].endswith(".json") or is_of_edition
        if is_one_edition:
            check_tensors(router_of(made, found), router_of(kept, was), only="statistics.")
        if "run" in found["train"]:
            assert (made / "runs" / found["train"]["run"]).is_dir()


def schema_of(store: Path, manifest: dict[str, Any]) -> str:
    """The schema of the router's files: a store that is made today routes by another edition than older releases."""
    return json.loads(router_of(store, manifest, "router/router.json").read_bytes())["schema"]


def router_of(store: Path, manifest: dict[str, Any], path: str = "router/router.safetensors") -> Path:
    (digest,) = [file["sha256"] for file in manifest["files"] if file["path"] == path]
    name = digest.removeprefix("sha256:")
    return store / "blobs" / "sha256" / name[:2] / name


def check_tensors(found: Path, kept: Path, *, only: str) -> None:
    """The same names, types, shapes and counts; floats within 1e-4, of those whose names begin like this."""
    ours, theirs = load_file(found), load_file(kept)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        if name.startswith(only):
            tolerance = 1e-4 if tensor.dtype.kind == "f" else 0
            assert ours[name].ravel().tolist() == pytest.approx(tensor.ravel().tolist(), rel=tolerance, abs=tolerance)
