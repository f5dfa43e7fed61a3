"""Endpoints of the Hub, and of its storage for LFS files."""

import base64
import hashlib
import json
import re
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from .faulty import Handler, Refused
from .repos import Commit, Repo, front_matter, is_lfs, tree_row


class Storage(Handler):
    """Storage for LFS files; requests must carry no token."""

    server_name = "storage"

    def route(self, token: str | None, body: bytes) -> tuple[Any, ...]:
        path, _, query = self.path.partition("?")
        target = self.hub.repos.objects / path.rsplit("/", 1)[1]
        if self.command == "GET":
            return self.part(target.read_bytes()) if target.is_file() else (404, {"error": "no such object"})
        name = f"{target.name}.{query}" if query else target.name
        if not query and hashlib.sha256(body).hexdigest() != target.name:
            return 400, {"error": "the bytes do not match the digest"}
        target.with_name(name).write_bytes(body)
        return 200, {}, {"ETag": hashlib.md5(body).hexdigest()}


class Api(Handler):
    """API of the Hub."""

    server_name = "hub"

    def route(self, token: str | None, body: bytes) -> tuple[Any, ...]:
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        self.token = token
        if token is not None and token not in self.hub.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        method = "GET" if self.command == "HEAD" else self.command
        for pattern, action in ROUTES:
            if match := re.fullmatch(pattern, f"{method} {address.path}"):
                given = {key: unquote(value or "") for key, value in match.groupdict().items()}
                return getattr(self, action)(body, **given)
        raise Refused(404, "no such endpoint")

    # --- permissions ---

    @property
    def names(self) -> list[str]:
        """Namespaces that the user may write to."""
        return self.hub.users.get(self.token or "", [])

    def find(self, repo_id: str, revision: str = "main", *, reads_files: bool = False) -> tuple[Repo, Commit]:
        repo = self.hub.repos.all.get(repo_id)
        is_member = repo is not None and repo_id.partition("/")[0] in self.names
        if repo is None or (repo.private and not is_member):
            message = "Repository not found" if self.token else "Invalid username or password."
            raise Refused(404 if self.token else 401, message, "RepoNotFound")
        if reads_files and repo.gated and not is_member:
            raise Refused(403 if self.token else 401, f"Access to model {repo_id} is restricted.", "GatedRepo")
        commit = self.hub.repos.find(repo, revision)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, commit

    def writable(self, repo_id: str) -> Repo:
        repo, _ = self.find(repo_id)
        if repo_id.partition("/")[0] not in self.names:
            raise Refused(403, f"You don't have the rights to write to {repo_id}")
        return repo

    # --- the endpoints ---

    def whoami(self, _: bytes) -> tuple[Any, ...]:
        if not self.names:
            raise Refused(401, "Invalid credentials in Authorization header")
        return 200, {"name": self.names[0], "type": "user", "orgs": [{"name": name} for name in self.names[1:]]}

    def create(self, body: bytes) -> tuple[Any, ...]:
        asked = json.loads(body)
        owner = asked.get("organization") or (self.names or [""])[0]
        repo_id = f"{owner}/{asked['name']}"
        if owner not in self.names:
            raise Refused(403 if self.token else 401, f"You don't have the rights to create a model under {owner}")
        if repo_id in self.hub.repos.all:
            return 409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo_id}"}
        self.hub.repos.create(repo_id, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return 200, {"url": f"{self.hub.url}/{repo_id}"}

    def validate(self, body: bytes) -> tuple[Any, ...]:
        import yaml

        try:
            front_matter(json.loads(body)["content"])
        except yaml.YAMLError as error:
            return 400, {"errors": [{"message": str(error)}], "warnings": []}
        return 200, {"errors": [], "warnings": []}

    def preupload(self, body: bytes, id: str, rev: str) -> tuple[Any, ...]:
        if not self.query.get("create_pr"):
            self.writable(id)
        _, commit = self.find(id, rev)
        rows = []
        for file in json.loads(body)["files"]:
            there, lfs = commit.files.get(file["path"]), is_lfs(file["path"], file["size"])
            oid = there and there["sha256" if there["is_lfs"] else "oid"]
            mode = "lfs" if lfs else "regular"
            rows.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": rows}

    def batch(self, body: bytes, id: str) -> tuple[Any, ...]:
        self.find(id)
        return 200, {"transfer": "basic", "objects": [self.upload(item) for item in json.loads(body)["objects"]]}

    def upload(self, item: dict[str, Any]) -> dict[str, Any]:
        """Return the upload actions of an LFS object: single or multipart, or none if it exists."""
        oid, size, chunk = item["oid"], item["size"], self.hub.multipart_size
        if (self.hub.repos.objects / oid).is_file():
            return {"oid": oid, "size": size}
        href, header = f"{self.hub.storage_url}/upload/{oid}", {}
        if size > chunk:
            parts = range(1, -(-size // chunk) + 1)
            header = {"chunk_size": str(chunk)} | {f"{part:05}": f"{href}?{part:05}" for part in parts}
            href = f"{self.hub.url}/api/complete/{oid}"
        verify = {"href": f"{self.hub.url}/api/verify/{oid}"}
        return {"oid": oid, "size": size, "actions": {"upload": {"href": href, "header": header}, "verify": verify}}

    def complete(self, body: bytes, oid: str) -> tuple[Any, ...]:
        target = self.hub.repos.objects / oid
        parts = [target.with_name(f"{oid}.{part['partNumber']:05}") for part in json.loads(body)["parts"]]
        data = b"".join(part.read_bytes() for part in parts)
        if hashlib.sha256(data).hexdigest() != oid:
            return 400, {"error": "the parts do not match the digest"}
        target.write_bytes(data)
        return 200, {}

    def verify(self, _: bytes, oid: str) -> tuple[Any, ...]:
        return (200, {}) if (self.hub.repos.objects / oid).is_file() else (404, {"error": "no such object"})

    def commit(self, body: bytes, id: str, rev: str) -> tuple[Any, ...]:
        is_pull_request = bool(self.query.get("create_pr"))
        repo = self.find(id)[0] if is_pull_request else self.writable(id)
        lines = [json.loads(line) for line in body.splitlines()]
        header, parent = lines[0]["value"], lines[0]["value"].get("parentCommit")
        if parent and not is_pull_request and not repo.refs[rev].startswith(parent):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files: dict[str, Any] = {}
        for line in lines[1:]:
            value = line["value"]
            path = value["path"]
            if line["key"] == "file":
                files[path] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                files[path] = None
            else:
                stored = self.hub.repos.objects / value["oid"]
                if not stored.is_file():
                    raise Refused(404, f"LFS object {value['oid']} is not there")
                files[path] = stored.read_bytes()
        ref, answer = rev, {}
        if is_pull_request:
            number = 1 + sum(name.startswith("pr/") for name in repo.refs)
            ref = f"pr/{number}"
            repo.refs[ref] = repo.refs[rev]
            answer = {"pullRequestUrl": f"{self.hub.url}/{id}/discussions/{number}"}
        done = self.hub.repos.commit(repo, ref, header["summary"], files, author=self.names[0])
        return 200, {"commitOid": done.id, "commitUrl": f"{self.hub.url}/{id}/commit/{done.id}", **answer}

    def model(self, _: bytes, id: str, rev: str = "") -> tuple[Any, ...]:
        repo, commit = self.find(id, rev or "main")
        return 200, self.hub.repos.info(repo, commit, blobs=bool(self.query.get("blobs")))

    def tree(self, body: bytes, id: str, rev: str) -> tuple[Any, ...]:
        commit = self.find(id, rev, reads_files=True)[1]
        rows = [{"type": "file", "path": path, **tree_row(file)} for path, file in sorted(commit.files.items())]
        start, size = int(self.query.get("cursor", ["0"])[0]), self.hub.page_size
        more = f'<{self.hub.url}{self.path.split("?")[0]}?recursive=true&cursor={start + size}>; rel="next"'
        return 200, rows[start : start + size], {"Link": more} if start + size < len(rows) else {}

    def models(self, _: bytes) -> tuple[Any, ...]:
        wanted = {tag for tags in self.query.get("filter", []) for tag in tags.split(",")}
        text, author = (self.query.get(key, [""])[0] for key in ("search", "author"))
        found = []
        for repo in self.hub.repos.all.values():
            owner = repo.id.partition("/")[0]
            info = self.hub.repos.info(repo, repo.commits[repo.refs["main"]])
            if not repo.private or owner in self.names:
                is_found = text.lower() in repo.id.lower() and author in ("", owner) and wanted <= {*info["tags"]}
                found += [info] if is_found else []
        return 200, found[: int(self.query.get("limit", ["1000"])[0])]

    def refs(self, _: bytes, id: str) -> tuple[Any, ...]:
        repo, _commit = self.find(id)

        def rows(kind: str, folder: str) -> list[dict[str, str]]:
            mine = [(name.removeprefix(kind), commit) for name, commit in repo.refs.items() if name.startswith(kind)]
            listed = mine if kind else [(name, commit) for name, commit in mine if "/" not in name]
            return [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": commit} for name, commit in listed]

        pulls = rows("pr/", "pr")
        return 200, {
            "branches": rows("", "heads"),
            "tags": rows("tags/", "tags"),
            "converts": [],
            "pullRequests": pulls,
        }

    def commits(self, _: bytes, id: str, rev: str) -> tuple[Any, ...]:
        repo, commit = self.find(id, rev)
        rows: list[dict[str, Any]] = []
        at: Commit | None = commit
        while at:
            authors = [{"user": at.author}]
            rows.append({"id": at.id, "title": at.title, "message": "", "date": at.date, "authors": authors})
            at = repo.commits.get(at.parent or "")
        return 200, rows

    def tag(self, body: bytes, id: str, rev: str) -> tuple[Any, ...]:
        repo = self.writable(id)
        name = f"tags/{json.loads(body)['tag']}"
        if name in repo.refs:
            raise Refused(409, "Tag reference exists already")
        repo.refs[name] = self.find(id, rev)[1].id
        self.hub.repos.save(repo)
        return 200, {}

    def resolve(self, body: bytes, id: str, rev: str, path: str) -> tuple[Any, ...]:
        commit = self.find(id, rev, reads_files=True)[1]
        file, headers = commit.files.get(path), {"X-Repo-Commit": commit.id}
        if file is None:
            return 404, {"error": "Entry not found"}, headers | {"X-Error-Code": "EntryNotFound"}
        if file["is_lfs"]:
            linked = {"X-Linked-Etag": f'"{file["sha256"]}"', "X-Linked-Size": str(file["size"])}
            return 302, b"", headers | linked | {"Location": f"{self.hub.storage_url}/{file['sha256']}"}
        status, data, more = self.part((self.hub.repos.objects / file["sha256"]).read_bytes())
        return status, data, headers | more | {"ETag": f'"{file["oid"]}"'}


MODEL = r"/api/models/(?P<id>[^/]+/[^/]+)"
ROUTES = [
    ("GET /api/whoami-v2", "whoami"),
    ("POST /api/repos/create", "create"),
    ("POST /api/validate-yaml", "validate"),
    ("POST /api/complete/(?P<oid>[0-9a-f]+)", "complete"),
    ("POST /api/verify/(?P<oid>[0-9a-f]+)", "verify"),
    (r"POST /(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
    (f"POST {MODEL}/preupload/(?P<rev>[^/]+)", "preupload"),
    (f"POST {MODEL}/commit/(?P<rev>[^/]+)", "commit"),
    (f"POST {MODEL}/tag/(?P<rev>[^/]+)", "tag"),
    (f"GET {MODEL}/tree/(?P<rev>[^/]+)", "tree"),
    (f"GET {MODEL}/refs", "refs"),
    (f"GET {MODEL}/commits/(?P<rev>[^/]+)", "commits"),
    (f"GET {MODEL}(/revision/(?P<rev>[^/]+))?", "model"),
    ("GET /api/models", "models"),
    (r"GET /(?P<id>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
]
