"""A small Hugging Face Hub on the loopback interface, in memory, for tests of `push_to_hub` and `from_pretrained`.

It serves models and datasets: creating repositories and branches, commits of regular and LFS files, listings and
downloads at any revision. It has no Xet storage, so clients run with `HF_HUB_DISABLE_XET=1`, and it answers 501 to a
request it does not know, which fails the test instead of hiding what is missing.

`huggingface_hub` reads its environment when it is imported, so clients of this Hub run in a process of their own:

    with LocalHub(home=tmp_path) as hub:
        output = run_python("import huggingface_hub; ...", hub.env())
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USER = "tester"
TOKEN = "hf_local"
LFS_SUFFIXES = (".safetensors", ".bin", ".parquet")
DATE = "2026-01-01T00:00:00.000Z"
CARD_VALUES = {
    "license": {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0"},
    "pipeline_tag": {"translation", "text-generation"},
    "library_name": {"transformers", "peft"},
    "base_model_relation": {"finetune", "adapter", "quantized", "merge"},
}
SOURCE = Path(__file__).parents[1] / "src"


class HubError(Exception):
    """A request the Hub refuses: `code` is what `huggingface_hub` turns into an exception class."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, **headers}


def card_errors(content: str, repositories: Collection[tuple[str, str]]) -> list[str]:
    """What is wrong with the metadata of a model card.

    The Hub's rules, as far as cards of this package go: codes of languages, known licenses, tasks and relations, names
    of repositories, and the form of a `model-index`. More strictly than the Hub, which only warns: models and datasets
    that are named exist.

    Args:
        content: of README.md.
        repositories: (kind, id) of all that there are.
    """
    found = re.match(r"---\n(.*?)\n---(?:\n|$)", content, re.DOTALL)
    data = yaml.safe_load(found[1]) if found else {}
    if not isinstance(data, dict):
        return ["the metadata must be an object"]

    def listed(name: str) -> list[Any]:
        value = data.get(name, [])
        return value if isinstance(value, list) else [value]

    errors = [
        f'"{name}" must be one of {", ".join(sorted(known))}'
        for name, known in CARD_VALUES.items()
        if name in data and data[name] not in known
    ]
    for language in listed("language"):
        if not isinstance(language, str) or not re.fullmatch(r"[a-z]{2,3}|multilingual|code", language):
            errors.append(f'"language" must be codes of ISO 639, not {language!r}')
    for name, kind in (("base_model", "models"), ("datasets", "datasets")):
        missing = [identity for identity in listed(name) if (kind, identity) not in repositories]
        errors += [f'"{name}" {identity!r} is not there' for identity in missing]
    for result in [result for model in listed("model-index") for result in model.get("results", [{}])]:
        dataset = {"type", "name"} <= result.get("dataset", {}).keys()
        if not (dataset and "type" in result.get("task", {}) and result.get("metrics")):
            errors.append('"model-index" must have a task, a dataset and metrics in each result')
    return errors


@dataclass(frozen=True)
class Request:
    """What a handler reads; `path` still has its percent escapes."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    authorization: str
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body or b"{}")


@dataclass(frozen=True)
class Response:
    """What a handler returns; `content` other than bytes is sent as JSON."""

    content: Any = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredFile:
    """One file of a commit: `lfs_oid` is the SHA-256 of an LFS file and None for a regular one."""

    data: bytes
    lfs_oid: str | None = None

    @property
    def blob_oid(self) -> str:
        """Git's name of the blob: that of the data, or of the pointer to it."""
        blob = self.data
        if self.lfs_oid is not None:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.lfs_oid}\nsize {len(self.data)}\n"
            blob = pointer.encode()
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob, usedforsecurity=False).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        """Description of the file in listings."""
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(self.data), "oid": self.blob_oid}
        if self.lfs_oid is not None:
            entry["lfs"] = {"oid": self.lfs_oid, "size": len(self.data), "pointerSize": 134}
        return entry


class Repository:
    """The commits of one repository (commit hash to path to file) and its branches (name to commit hash)."""

    def __init__(self, repo_id: str) -> None:
        self.repo_id = repo_id
        self.commits: dict[str, dict[str, StoredFile]] = {}
        self.branches: dict[str, str] = {}
        self.commit("main", {})

    def commit(self, branch: str, files: dict[str, StoredFile]) -> str:
        """Make a commit with exactly `files` the head of `branch` and return its hash."""
        commit = hashlib.sha1(f"{self.repo_id} {len(self.commits)}".encode(), usedforsecurity=False).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit

    def resolve(self, revision: str) -> str:
        """Hash of the commit that a branch name or a commit hash stands for."""
        commit = self.branches.get(revision, revision)
        if commit not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit


class HubState:
    """Everything the Hub stores, and one handler per kind of request."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.lock = threading.Lock()

    def respond(self, request: Request) -> Response:
        """Answer `request` through `ROUTES`; refusals become error responses."""
        for method, pattern, public, handler in ROUTES:
            match = re.fullmatch(pattern, request.path)
            if match is None or method != request.method:
                continue
            try:
                if not public and request.authorization != f"Bearer {TOKEN}":
                    raise HubError(401, "RepoNotFound", "Invalid username or password.")
                with self.lock:
                    return handler(self, request, **{name: unquote(text) for name, text in match.groupdict("").items()})
            except HubError as error:
                return Response({"error": str(error)}, error.status, error.headers)
        return Response({"error": f"The local Hub does not serve {request.method} {request.path}"}, 501)

    def repository(self, kind: str, repo_id: str) -> Repository:
        """The repository of a kind, "models" (also "") or "datasets"."""
        try:
            return self.repositories[kind or "models", repo_id]
        except KeyError:
            raise HubError(404, "RepoNotFound", "Repository not found") from None

    def whoami(self, request: Request) -> Response:
        token = {"displayName": "local", "role": "write"}
        account = {"type": "user", "name": USER, "fullname": USER, "orgs": []}
        return Response({**account, "auth": {"type": "access_token", "accessToken": token}})

    def validate_yaml(self, request: Request) -> Response:
        errors = [{"message": error} for error in card_errors(request.json()["content"], self.repositories)]
        return Response({"errors": errors, "warnings": []}, 400 if errors else 200)

    def create_repo(self, request: Request) -> Response:
        options = request.json()
        kind = f"{options.get('type') or 'model'}s"
        repo_id = f"{options.get('organization') or USER}/{options['name']}"
        url = f"{self.url}/{'' if kind == 'models' else kind + '/'}{repo_id}"
        if (kind, repo_id) in self.repositories:
            return Response({"error": "You already created this repo", "url": url}, 409)
        self.repositories[kind, repo_id] = Repository(repo_id)
        return Response({"url": url, "name": repo_id, "id": repo_id})

    def create_branch(self, request: Request, kind: str, repo_id: str, branch: str) -> Response:
        repository = self.repository(kind, repo_id)
        if branch in repository.branches:
            raise HubError(409, "Conflict", "Reference already exists")
        repository.branches[branch] = repository.resolve(request.json().get("startingPoint") or "main")
        return Response({})

    def repo_info(self, request: Request, kind: str, repo_id: str, revision: str) -> Response:
        repository = self.repository(kind, repo_id)
        commit = repository.resolve(revision or "main")
        names = {"id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0], "sha": commit}
        dates = {"lastModified": DATE, "createdAt": DATE}
        flags = {"private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        return Response({**names, **dates, **flags, "siblings": [{"rfilename": p} for p in repository.commits[commit]]})

    def tree(self, request: Request, kind: str, repo_id: str, revision: str, folder: str) -> Response:
        repository = self.repository(kind, repo_id)
        prefix = f"{folder.strip('/')}/" if folder else ""
        recursive = request.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = []
        folders: set[str] = set()
        for path, file in sorted(repository.commits[repository.resolve(revision)].items()):
            if not path.startswith(prefix):
                continue
            *parents, _ = path.removeprefix(prefix).split("/")
            folders.update("/".join(parents[: depth + 1]) for depth in range(len(parents)) if recursive or depth == 0)
            if recursive or not parents:
                entries.append(file.entry(path))
        if prefix and not entries and not folders:
            raise HubError(404, "EntryNotFound", "Entry not found")
        directories = [{"type": "directory", "path": prefix + name, "oid": "", "size": 0} for name in sorted(folders)]
        return Response(directories + entries)

    def preupload(self, request: Request, kind: str, repo_id: str, revision: str) -> Response:
        """Tell the client for each file how to send it, and its hash if it exists already."""
        repository = self.repository(kind, repo_id)
        commit = repository.resolve(revision)
        modes = []
        for file in request.json()["files"]:
            path = file["path"]
            mode = {"path": path, "shouldIgnore": False}
            mode["uploadMode"] = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            if (stored := repository.commits[commit].get(path)) is not None:
                mode["oid"] = stored.lfs_oid or stored.blob_oid
            modes.append(mode)
        return Response({"commitOid": commit, "files": modes})

    def lfs_batch(self, request: Request, kind: str, repo_id: str) -> Response:
        """Tell the client where to send each LFS object, nowhere if it is known."""
        self.repository(kind, repo_id)
        objects = []
        for item in request.json()["objects"]:
            answer: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.lfs_objects:  # a known object has no "actions" at all
                answer["actions"] = {"upload": {"href": f"{self.url}/lfs/{item['oid']}"}}
            objects.append(answer)
        return Response({"transfer": "basic", "objects": objects})

    def lfs_upload(self, request: Request, oid: str) -> Response:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, "BadRequest", "The SHA-256 of the object is not its name")
        self.lfs_objects[oid] = request.body
        return Response()

    def commit(self, request: Request, kind: str, repo_id: str, branch: str) -> Response:
        """Apply the operations of a commit, one JSON object per line, to the head of `branch`."""
        repository = self.repository(kind, repo_id)
        if branch not in repository.branches:
            raise HubError(404, "RevisionNotFound", f"{branch} is not a branch")
        head = repository.branches[branch]
        files = dict(repository.commits[head])
        for line in request.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "header":
                    if value.get("parentCommit", head) != head:
                        raise HubError(412, "Conflict", "A commit has happened since")
                case "file":
                    files[value["path"]] = StoredFile(base64.b64decode(value["content"]))
                case "lfsFile":
                    if value["oid"] not in self.lfs_objects:
                        raise HubError(400, "BadRequest", f"The LFS object of {value['path']} was not uploaded")
                    files[value["path"]] = StoredFile(self.lfs_objects[value["oid"]], lfs_oid=value["oid"])
                case "deletedFile":
                    if files.pop(value["path"], None) is None:
                        raise HubError(404, "EntryNotFound", f"{value['path']} does not exist")
                case key:
                    raise HubError(501, "NotImplemented", f"The local Hub does not know the operation {key}")
        commit = repository.commit(branch, files)
        url = f"{self.url}/{'datasets/' if kind == 'datasets' else ''}{repo_id}/commit/{commit}"
        return Response({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def download(self, request: Request, kind: str, repo_id: str, revision: str, path: str) -> Response:
        repository = self.repository(kind, repo_id)
        commit = repository.resolve(revision)
        file = repository.commits[commit].get(path)
        if file is None:
            raise HubError(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit})
        headers = {"ETag": f'"{file.lfs_oid or file.blob_oid}"', "X-Repo-Commit": commit}
        if file.lfs_oid is not None:
            headers |= {"X-Linked-Etag": f'"{file.lfs_oid}"', "X-Linked-Size": str(len(file.data))}
        return Response(file.data, headers=headers)


API = r"/api/(?P<kind>models|datasets)/(?P<repo_id>[^/]+/[^/]+)"
WEB = r"/(?:(?P<kind>datasets)/)?(?P<repo_id>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
BRANCH = r"(?P<branch>[^/]+)"

# Method, pattern of the escaped path, whether it is open to clients without a token, handler.
ROUTES: tuple[tuple[str, str, bool, Callable[..., Response]], ...] = (
    ("GET", "/api/whoami-v2", False, HubState.whoami),
    ("POST", "/api/validate-yaml", True, HubState.validate_yaml),
    ("POST", "/api/repos/create", False, HubState.create_repo),
    ("POST", f"{API}/branch/{BRANCH}", False, HubState.create_branch),
    ("GET", f"{API}(?:/revision/{REVISION})?", False, HubState.repo_info),
    ("GET", f"{API}/tree/{REVISION}(?:/(?P<folder>.+))?", False, HubState.tree),
    ("POST", f"{API}/preupload/{REVISION}", False, HubState.preupload),
    ("POST", rf"{WEB}\.git/info/lfs/objects/batch", False, HubState.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", True, HubState.lfs_upload),
    ("POST", f"{API}/commit/{BRANCH}", False, HubState.commit),
    ("GET", f"{WEB}/resolve/{REVISION}/(?P<path>.+)", False, HubState.download),
)


class LocalHub(ThreadingHTTPServer):
    """The Hub as a server; as a context manager it runs in a thread.

    Args:
        home: folder for the cache of the clients that `env` is given to.
    """

    daemon_threads = True

    def __init__(self, home: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.home = home
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.state = HubState(self.url)
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> "LocalHub":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def env(self) -> dict[str, str]:
        """Environment of a client process: this Hub and nothing of the caller's Hugging Face settings."""
        prefixes = ("HF_", "HUGGING_FACE_", "HUGGINGFACE_", "TRANSFORMERS_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
        return inherited | {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")])),
        }

    def files(self, repo_id: str, revision: str = "main", kind: str = "models") -> dict[str, StoredFile]:
        """The stored files of a repository by path."""
        repository = self.state.repository(kind, repo_id)
        return repository.commits[repository.resolve(revision)]


class _Handler(BaseHTTPRequestHandler):
    """Translates between HTTP and `HubState.respond`."""

    server: LocalHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        url = urlsplit(self.path)
        request = Request(
            method="GET" if self.command == "HEAD" else self.command,
            path=url.path,
            query=parse_qs(url.query),
            authorization=self.headers.get("Authorization", ""),
            body=self._read_body(),
        )
        response = self.server.state.respond(request)
        is_json = not isinstance(response.content, bytes)
        content = json.dumps(response.content).encode() if is_json else response.content
        self.send_response(response.status)
        self.send_header("Content-Type", "application/json" if is_json else "application/octet-stream")
        self.send_header("Content-Length", str(len(content)))
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the output of the tests free of access logs."""


def run_python(script: str, env: Mapping[str, str], timeout_s: float = 120) -> str:
    """Run an indented or flat `script` in a new interpreter and return what it prints.

    Raises:
        AssertionError: the script fails; the message holds its output.
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    process = subprocess.run(command, env=dict(env), capture_output=True, text=True, timeout=timeout_s)
    if process.returncode != 0:
        raise AssertionError(f"The script exited with {process.returncode}\n{process.stdout}\n{process.stderr}")
    return process.stdout
