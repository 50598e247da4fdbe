"""A stand-in for kube-apiserver, enough for an unmodified kubectl: `make manifests` applies to it.

It discovers, stores, lists, applies (server-side: the newest wins whole), dry-runs, scales and
deletes; it refuses what Kubernetes' strict schemas or ours of the custom resources refuse, and
objects of a namespace that is not there. It is not an API server: no defaults, no merging of field
owners, no admission, no CEL, no Pod Security, no controllers; nothing ever runs.

    python -m tests.kubernetes.fake_api --kubernetes 1.30     prints the port it listens on
"""

from __future__ import annotations

import argparse
import copy
import json
import threading
import uuid
from collections.abc import Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import yaml
from jsonschema import Draft202012Validator
from kubernetes_validate.utils import all_versions, major_minor
from referencing import Registry, Resource

from tests.kubernetes import custom_resources
from tests.kubernetes.fake_discovery import RESOURCES, Kind, discovery
from tests.kubernetes.manifests import Manifest


class ApiError(Exception):
    """What the server answers instead of an object."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason = code, reason


class Place(NamedTuple):
    """What a path names; `name` is empty for a collection."""

    resource: Kind
    namespace: str
    name: str
    subresource: str

    @property
    def key(self) -> tuple[str, str, str]:
        """Under which the object is kept."""
        return self.resource.plural, self.namespace, self.name


def locate(path: str) -> Place:
    """Read `/apis/GROUP/VERSION/namespaces/NAMESPACE/PLURAL/NAME/SUBRESOURCE`.

    Raises:
        ApiError: it names no resource.
    """
    for resource in RESOURCES:
        prefix = f"/{resource.root}/"
        if not path.startswith(prefix):
            continue
        rest, namespace = path.removeprefix(prefix).split("/"), ""
        if rest[0] == "namespaces" and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        if rest[0] == resource.plural:
            name, subresource = [*rest[1:], "", ""][:2]
            return Place(resource, namespace, name, subresource)
    raise ApiError(404, "NotFound", f"{path}: no such resource")


class Cluster:
    """The objects, and what may become one."""

    def __init__(self, kubernetes_version: str) -> None:
        self.kubernetes_version = kubernetes_version
        self._objects: dict[tuple[str, str, str], Manifest] = {}
        self._sound: set[str] = set()
        self._lock = threading.Lock()
        self._num_writes = 0

    def get(self, place: Place) -> Manifest:
        """One object, its scale, or a list of them."""
        if not place.name:
            return self._list(place)
        with self._lock:
            found = self._objects.get(place.key)
        if found is None:
            raise ApiError(404, "NotFound", f'{place.resource.plural} "{place.name}" not found')
        return _scale_of(found) if place.subresource == "scale" else found

    def write(self, place: Place, manifest: Manifest, *, is_dry_run: bool) -> Manifest:
        """Keep the object after looking at it."""
        self._check(place, manifest)
        with self._lock:
            old = self._objects.get(place.key)
            new = copy.deepcopy(manifest)
            if old is not None and _without_metadata(old) == _without_metadata(new):
                return old
            self._num_writes += 1
            new["metadata"] |= {
                "uid": old["metadata"]["uid"] if old else str(uuid.uuid4()),
                "creationTimestamp": "2026-01-01T00:00:00Z",
                "resourceVersion": str(self._num_writes),
            }
            if not is_dry_run:
                self._objects[place.key] = new
            return new

    def scale(self, place: Place, replicas: int) -> Manifest:
        """What `kubectl scale` does: nothing but the number changes."""
        found = copy.deepcopy(self.get(place._replace(subresource="")))
        found["spec"]["replicas"] = replicas
        return _scale_of(self.write(place, found, is_dry_run=False))

    def delete(self, place: Place) -> Manifest:
        """Forget one object."""
        found = self.get(place)
        with self._lock:
            self._objects.pop(place.key, None)
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Success",
            "details": {"name": place.name, "uid": found["metadata"]["uid"]},
        }

    def _list(self, place: Place) -> Manifest:
        with self._lock:
            items = [
                each
                for (plural, namespace, _), each in self._objects.items()
                if plural == place.resource.plural and place.namespace in ("", namespace)
            ]
        return {
            "kind": f"{place.resource.kind}List",
            "apiVersion": place.resource.api_version,
            "metadata": {"resourceVersion": str(self._num_writes)},
            "items": items,
        }

    def _check(self, place: Place, manifest: Manifest) -> None:
        if place.resource.is_namespaced:
            home = ("namespaces", "", place.namespace)
            if home not in self._objects:
                raise ApiError(404, "NotFound", f'namespaces "{place.namespace}" not found')
        sent = copy.deepcopy(manifest)
        for key in ("uid", "creationTimestamp", "resourceVersion", "managedFields"):
            sent["metadata"].pop(key, None)
        text = json.dumps(sent)
        if text in self._sound:
            return
        found = list(self._problems(sent))
        if found:
            raise ApiError(422, "Invalid", f"{place.name} is invalid: {'; '.join(found)}")
        self._sound.add(text)

    def _problems(self, manifest: Manifest) -> Iterator[str]:
        if (manifest["apiVersion"], manifest["kind"]) in custom_resources.kinds():
            yield from custom_resources.problems([manifest])
            return
        for error in validator(self.kubernetes_version, manifest).iter_errors(manifest):
            yield f"{'.'.join(str(part) for part in error.absolute_path)}: {error.message}"


def validator(version: str, manifest: Manifest) -> Draft202012Validator:
    """Kubernetes' own strict schema of the object's kind."""
    *group, api = manifest["apiVersion"].split("/")
    kind = "-".join([manifest["kind"].lower(), *[each.split(".")[0] for each in group], api])
    schema = _schema(version, kind)
    registry = [Resource.from_contents(schema), _definitions(version)] @ Registry()
    return Draft202012Validator(schema, registry=registry)


@cache
def _definitions(version: str) -> Any:
    return Resource.from_contents(_schema(version, "_definitions"))


@cache
def _schema(version: str, name: str) -> Any:
    """A file of the package that `make manifests` checks with; it reads them anew each time."""
    full = [each for each in all_versions() if major_minor(each) == version][-1]
    folder = files("kubernetes_validate") / "kubernetes-json-schema" / f"v{full}-local-strict"
    return json.loads((folder / f"{name}.json").read_text("utf8"))


def _without_metadata(manifest: Manifest) -> Manifest:
    metadata = manifest["metadata"]
    kept = {key: metadata.get(key) for key in ("name", "labels", "annotations")}
    return {**manifest, "metadata": kept}


def _scale_of(manifest: Manifest) -> Manifest:
    names = ("name", "namespace", "uid", "resourceVersion")
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {name: manifest["metadata"][name] for name in names},
        "spec": {"replicas": manifest["spec"].get("replicas", 1)},
        "status": {"replicas": 0},
    }


class Handler(BaseHTTPRequestHandler):
    """HTTP in, objects out."""

    protocol_version = "HTTP/1.1"
    cluster: Cluster

    def do_GET(self) -> None:
        known = discovery(urlsplit(self.path).path, self.cluster.kubernetes_version)
        self._answer(lambda place: self.cluster.get(place), known=known)

    def do_POST(self) -> None:
        self._answer(self._write)

    def do_PATCH(self) -> None:
        self._answer(self._write)

    def do_DELETE(self) -> None:
        self._body()
        self._answer(lambda place: self.cluster.delete(place))

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of every call."""

    def _write(self, place: Place) -> Manifest:
        query = dict(parse_qsl(urlsplit(self.path).query))
        kind = self.headers.get("Content-Type", "")
        sent = self._body()
        if place.subresource == "scale":
            return self.cluster.scale(place, yaml.safe_load(sent)["spec"]["replicas"])
        if ("json" not in kind and "yaml" not in kind) or "merge-patch" in kind:
            raise ApiError(415, "UnsupportedMediaType", f"{kind}: apply server-side")
        manifest = yaml.safe_load(sent)
        place = place._replace(name=manifest["metadata"]["name"])
        return self.cluster.write(place, manifest, is_dry_run=query.get("dryRun") == "All")

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, act: Any, *, known: Manifest | None = None) -> None:
        code = 200
        try:
            answer = known or act(locate(urlsplit(self.path).path))
        except ApiError as error:
            code = error.code
            answer = {
                "kind": "Status",
                "apiVersion": "v1",
                "status": "Failure",
                "reason": error.reason,
                "message": str(error),
                "code": code,
            }
        body = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description="A stand-in for kube-apiserver.")
    parser.add_argument("--kubernetes", required=True, help="version, as 1.30")
    Handler.cluster = Cluster(parser.parse_args().kubernetes)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
