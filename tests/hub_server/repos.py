"""Repositories in a folder: commits, branches, tags, pull requests, and the bytes of all files."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

LFS_SIZE = 10 << 20  # bytes


@dataclass
class Commit:
    """Commit with its whole tree."""

    id: str
    title: str
    date: str
    author: str
    parent: str | None
    files: dict[str, dict[str, Any]]  # path: oid, size, sha256, is_lfs


@dataclass
class Repo:
    """Repository."""

    id: str
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)  # main, tags/v1, pr/1: commit
    commits: dict[str, Commit] = field(default_factory=dict)


class Repos:
    """All repositories by id."""

    def __init__(self, folder: Path):
        self.objects, self.folder = folder / "objects", folder
        self.objects.mkdir(parents=True, exist_ok=True)
        self.all = {repo.id: repo for repo in map(_load_repo, sorted(folder.glob("*.repo.json")))}

    def create(self, repo_id: str, *, private: bool = False) -> Repo:
        """Create a repository with one commit."""
        repo = self.all[repo_id] = Repo(repo_id, private=private)
        self.commit(repo, "main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return repo

    def commit(self, repo: Repo, ref: str, title: str, files: dict[str, bytes | None], author: str = "alice") -> Commit:
        """Commit files on top of a ref; None deletes a file."""
        parent = repo.refs.get(ref)
        tree = dict(repo.commits[parent].files) if parent else {}
        for path, content in files.items():
            tree.pop(path, None)
            if content is not None:
                tree[path] = self.keep(path, content)
        date = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        commit_id = hashlib.sha1(json.dumps([repo.id, parent, tree, title, date]).encode()).hexdigest()
        commit = repo.commits[commit_id] = Commit(commit_id, title, date, author, parent, tree)
        repo.refs[ref] = commit_id
        self.save(repo)
        return commit

    def keep(self, path: str, data: bytes) -> dict[str, Any]:
        """Store the bytes of a file, and return its tree entry."""
        sha256 = hashlib.sha256(data).hexdigest()
        (self.objects / sha256).write_bytes(data)
        oid = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
        return {"oid": oid, "size": len(data), "sha256": sha256, "is_lfs": is_lfs(path, len(data))}

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        """Return the bytes of a file at a revision."""
        commit = self.find(self.all[repo_id], revision)
        assert commit is not None
        return (self.objects / commit.files[path]["sha256"]).read_bytes()

    def find(self, repo: Repo, revision: str) -> Commit | None:
        """Resolve a branch, tag, pull request or commit id."""
        name = revision.removeprefix("refs/").removeprefix("heads/")
        found = repo.refs.get(name) or repo.refs.get(f"tags/{name}")
        if found is None and re.fullmatch("[0-9a-f]{7,40}", revision):
            found = next((commit for commit in repo.commits if commit.startswith(revision)), None)
        return repo.commits.get(found) if found else None

    def save(self, repo: Repo) -> None:
        """Write the repository's record."""
        (self.folder / f"{repo.id.replace('/', '--')}.repo.json").write_text(json.dumps(asdict(repo)))

    def info(self, repo: Repo, commit: Commit, *, blobs: bool = False) -> dict[str, Any]:
        """Return the response of /api/models for a repository."""
        card = self.card(commit)
        tags = [*card.get("tags", []), *(f"{key}:{card[key]}" for key in ("license", "base_model") if card.get(key))]
        if card.get("base_model"):
            tags.append(f"base_model:{card.get('base_model_relation', 'adapter')}:{card['base_model']}")
        siblings = [{"rfilename": path, **(blob_row(file) if blobs else {})} for path, file in commit.files.items()]
        named = {
            "id": repo.id,
            "modelId": repo.id,
            "author": repo.id.partition("/")[0],
            "sha": commit.id,
            "cardData": card,
        }
        counted = {"private": repo.private, "gated": repo.gated and "manual", "disabled": False, "downloads": 0}
        dates = {"lastModified": commit.date, "createdAt": commit.date}
        return {**named, **counted, **dates, "likes": 0, "tags": tags, "siblings": siblings}

    def card(self, commit: Commit) -> dict[str, Any]:
        if "README.md" not in commit.files:
            return {}
        text = (self.objects / commit.files["README.md"]["sha256"]).read_text()
        return front_matter(text)


def is_lfs(path: str, size: int) -> bool:
    return path.endswith(".safetensors") or size > LFS_SIZE


def front_matter(text: str) -> dict[str, Any]:
    """Parse the YAML front matter; raises yaml.YAMLError."""
    import yaml

    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    return (yaml.safe_load(match[1]) or {}) if match else {}


def _load_repo(path: Path) -> Repo:
    record = json.loads(path.read_text())
    return Repo(**record | {"commits": {key: Commit(**value) for key, value in record["commits"].items()}})


def blob_row(file: dict[str, Any]) -> dict[str, Any]:
    lfs = {"lfs": {"sha256": file["sha256"], "size": file["size"], "pointerSize": 130}} if file["is_lfs"] else {}
    return {"size": file["size"], "blobId": file["oid"], **lfs}


def tree_row(file: dict[str, Any]) -> dict[str, Any]:
    """Return the file's row of a tree listing."""
    lfs = {"lfs": {"oid": file["sha256"], "size": file["size"], "pointerSize": 130}} if file["is_lfs"] else {}
    return {"oid": file["oid"], "size": file["size"], **lfs}
