"""Strict schemas of the custom resources, as far as this project uses them.

No schema of a CRD comes with Kubernetes. These are written by hand from the projects' references:
a field that is not named in one is an error, also where the real CRD knows it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from jsonschema import Draft202012Validator

from tests.kubernetes.manifests import Manifest, title

SCHEMAS = Path(__file__).parent / "schemas"


def kinds() -> dict[tuple[str, str], Path]:
    """Schema files by `(apiVersion, kind)`."""
    found = {}
    for path in sorted(SCHEMAS.glob("*.json")):
        properties = json.loads(path.read_text("utf8"))["properties"]
        found[properties["apiVersion"]["const"], properties["kind"]["const"]] = path
    return found


def problems(manifests: Sequence[Manifest]) -> Iterator[str]:
    """One line for each field that a schema refuses."""
    known = kinds()
    for manifest in manifests:
        path = known.get((manifest["apiVersion"], manifest["kind"]))
        if path is None:
            continue
        schema = json.loads(path.read_text("utf8"))
        for error in Draft202012Validator(schema).iter_errors(manifest):
            where = ".".join(str(part) for part in error.absolute_path)
            yield f"{title(manifest)}: {where}: {error.message}"
