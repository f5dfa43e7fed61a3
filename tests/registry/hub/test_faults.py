"""Random sequences of faults against push and pull: no partial state is visible, and a repeated command succeeds."""

import random
from dataclasses import dataclass
from typing import Any

import pytest
from huggingface_hub import HfApi

from lorary.domains.errors import LoraryError
from lorary.registry.store.manifest import PackManifest

PUSHED = [
    "/commit/",
    "/preupload/",
    "objects/batch",
    "PUT ",
    "/verify/",
    "/tag/",
    "/validate-yaml",
    "/repos/create",
    "/refs",
]
PULLED = [
    "HEAD .*/resolve/",
    "GET .*/resolve/",
    "GET /[0-9a-f]{64}",
    "GET /api/models/[^/]+/[^/]+(/revision.*)?$",
    "lorary.json",
]
KINDS = [
    ("status", 503),
    ("status", 500),
    ("status", 429),
    ("status", 403),
    ("status", 412),
    ("after", 500),
    ("after", 504),
]
KINDS += [("drop", 0), ("cut", 0), ("cut", 90), ("short", 40), ("wrong", 33), ("wrong", 0), ("redirect", 0)]
EXPECTED = {4, 5, 7}


@dataclass
class Case:
    """A Hub and two registries that push to it and pull from it."""

    hub: Any
    mine: Any
    theirs: Any

    def check(self, repo):
        """Assert that neither the Hub nor the store has partial state."""
        record = self.hub.repos.all.get(repo)
        if record is not None:
            for commit in record.commits.values():
                self.check_commit(commit)
            titles = [commit.title for commit in record.commits.values()]
            assert len(titles) == len(set(titles)), titles
        for name in self.theirs.store.domains():
            digests = []
            for version in self.theirs.store.versions(name):
                manifest = self.theirs.store.manifest(name, version)
                self.theirs.store.verify(manifest)
                digests.append(manifest.digest)
            assert len(digests) == len(set(digests))

    def check_commit(self, commit):
        """Assert that a commit has no pack or a complete one."""
        if "lorary.json" not in commit.files:
            assert set(commit.files) <= {".gitattributes"}
            return
        objects = self.hub.repos.objects
        data = (objects / commit.files["lorary.json"]["sha256"]).read_bytes()
        manifest = PackManifest.from_json(data, source="on the Hub")
        there = {path: "sha256:" + file["sha256"] for path, file in commit.files.items()}
        assert {file.path: file.sha256 for file in manifest.files}.items() <= there.items()


def put_faults(hub, draw, patterns):
    """Inject one to five faults, each up to six times."""
    for _ in range(draw.randint(1, 5)):
        kind, value = draw.choice(KINDS)
        hub.fault(draw.choice(patterns), kind, value, times=draw.randint(1, 6))


def attempt(command):
    """Return the exit code of a command, 0 for success."""
    try:
        command()
    except LoraryError as error:
        failure = error
    else:
        return 0
    assert failure.cause
    assert failure.fix
    return failure.exit_code


def run_schedule(seed, local_hub, mine, theirs):
    """Push and pull two versions under faults, then repeat each command without them."""
    draw = random.Random(seed)
    repo, name = f"acme/lorary-x{seed}", f"x{seed}"
    case = Case(local_hub, mine, theirs)
    for version in (1, 2):
        commands = [
            (lambda: mine.push(f"legal@{version}", repo), PUSHED + PULLED),  # noqa: B023
            (lambda: theirs.pull(f"{repo}@v{version}", name=name), PULLED),  # noqa: B023
        ]
        for command, patterns in commands:
            for _ in range(draw.randint(1, 2)):
                put_faults(local_hub, draw, patterns)
                assert attempt(command) in EXPECTED | {0}
                case.check(repo)
            local_hub.faults.clear()
            assert attempt(command) == 0
            case.check(repo)
    assert theirs.store.versions(name) == [1, 2]
    assert [commit.title for commit in HfApi().list_repo_commits(repo)] == [
        "legal, version 2",
        "legal, version 1",
        "initial commit",
    ]


@pytest.fixture
def registries(local_hub, light_store, light_pack, no_waiting):
    """One registry with two versions of legal, and one without."""
    mine, theirs = light_store("mine"), light_store("theirs")
    for text in ("one", "two"):
        light_pack(mine, text=text)
    return mine, theirs


def test_ten_sequences_of_faults(registries, local_hub):
    for seed in range(10):
        run_schedule(seed, local_hub, *registries)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(12))
def test_many_sequences_of_faults(registries, local_hub, block):
    for seed in range(100 + 20 * block, 120 + 20 * block):
        run_schedule(seed, local_hub, *registries)
