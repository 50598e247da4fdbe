#!/usr/bin/env python3
"""What `make lint` knows of the packages: exact pins, what they ask for, licences, advisories.

    audit.py [--service URL]

The first three need no network. The advisories are asked of OSV (https://osv.dev), one request for
all pins; where it cannot be reached that is said, and is no fault: a lint must not need a network.
pip-audit asks the same service, and brings a dozen packages of its own to do so.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from importlib.metadata import Distribution, distributions
from pathlib import Path

HERE = Path(__file__).parent
OSV = "https://api.osv.dev/v1/querybatch"
ANSWER_SECONDS = 10.0

# The files of one environment; what two of them pin, they pin alike.
ENVIRONMENTS = (("cpu.txt", "dev.txt", "verifier.txt"), ("gpu.txt", "dev.txt"), ("ops.txt",))

# Asked for, and left out on purpose; cpu.txt says why.
LEFT_OUT = {"torchaudio", "torchcodec", "torchvision", "triton"}

LICENCES = {
    "0BSD", "Academic Free License (AFL)", "Apache-2.0", "Apache-2.0 WITH LLVM-exception",
    "Apache 2.0", "Apache 2.0 License", "Apache License 2.0", "Apache Software License",
    "Apache Software License 2.0", "3-Clause BSD License", "BSD", "BSD License", "BSD-2-Clause",
    "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "ISC", "ISC License (ISCL)", "MIT",
    "MIT License", "MIT-0", "MIT-CMU", "MPL-2.0", "Mozilla Public License 2.0 (MPL 2.0)",
    "OSI Approved", "PSF-2.0", "Python Software Foundation License", "The Unlicense (Unlicense)",
    "DFSG approved",
}  # fmt: skip
"""Permissive, or weak copyleft that ends at the file: none asks anything of who uses Isentrope."""

REVIEWED_LICENCES = {
    "intel-cmplr-lib-ur": "Intel Simplified Software License: may be redistributed unchanged",
    "intel-openmp": "Intel Simplified Software License: may be redistributed unchanged",
    "oss-harmony": "Apache-2.0, in its licence file",
    "pycountry": "LGPL-2.1-only: imported by vLLM as it is, not changed",
    "setuptools": "MIT, in its licence file",
    "supervisor": "BSD-derived, the Repoze licence",
    "zss": "BSD-2-Clause, in its source",
}
"""Packages that say nothing, or name no licence of the above; each was looked at."""

_PIN = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[\w.!+]+)")
_SETUP_PIN = re.compile(r"'(?P<name>[\w-]+)==(?P<version>[\w.]+)'")


def main() -> int:
    """Print every fault; 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--service", default=OSV, help="where advisories are asked for")
    given = parser.parse_args()
    pins = {path.name: read_pins(path) for path in sorted(HERE.glob("*.txt"))}
    faults = [
        *(f"{name}: {line!r} is no exact pin" for name, (_, bad) in pins.items() for line in bad),
        *contradictions({name: found for name, (found, _) in pins.items()}),
        *unmet(),
        *unknown_licences(distributions()),
    ]
    every = {pin for found, _ in pins.values() for pin in found.items()} | setup_pins()
    faults += vulnerable(sorted(every), given.service, read_ignored())
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if faults else 0


def read_pins(path: Path) -> tuple[dict[str, str], list[str]]:
    """Versions by normalised name, and the lines that are no exact pin."""
    found, bad = {}, []
    for line in path.read_text("utf8").splitlines():
        text = line.partition("#")[0].strip()
        pin = _PIN.fullmatch(text)
        if pin:
            found[normalised(pin["name"])] = pin["version"]
        elif text:
            bad.append(line)
    return found, bad


def setup_pins() -> set[tuple[str, str]]:
    """What deploy/setup.sh itself installs."""
    text = (HERE.parent / "setup.sh").read_text("utf8")
    return {(normalised(pin["name"]), pin["version"]) for pin in _SETUP_PIN.finditer(text)}


def normalised(name: str) -> str:
    """The one spelling of a package's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def contradictions(pins: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """Packages that two files of one environment pin to different versions."""
    for files in ENVIRONMENTS:
        first: dict[str, str] = {}
        for file in files:
            for name, version in pins[file].items():
                if first.setdefault(name, version) != version:
                    yield f"{file}: {name}=={version}, but {first[name]} beside it"


def unmet() -> Iterator[str]:
    """What an installed package asks for and does not find, but for what is left out."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "check"]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    for line in checked.stdout.splitlines() if checked.returncode else ():
        missing = re.search(r"requires ([\w.-]+), which is not installed", line)
        if missing is None or normalised(missing[1]) not in LEFT_OUT:
            yield line


def unknown_licences(installed: Iterator[Distribution]) -> Iterator[str]:
    """Installed packages whose licence is not one of those that were agreed to."""
    for each in installed:
        name = normalised(each.metadata["Name"])
        licence = licence_of(each)
        parts = re.split(r" AND | OR |; ", licence)
        if name not in REVIEWED_LICENCES and not set(parts) <= LICENCES:
            yield f"{name}: licence {licence!r} is not among those agreed to"


def licence_of(installed: Distribution) -> str:
    """As the package says it: an SPDX expression, a classifier, or a line of its own."""
    metadata = installed.metadata
    classifiers = [
        each.split("::")[-1].strip()
        for each in metadata.get_all("Classifier") or ()
        if each.startswith("License ::")
    ]
    lines = (metadata.get("License") or "").splitlines() or [""]
    return metadata.get("License-Expression") or "; ".join(classifiers) or lines[0].strip()


def vulnerable(pins: list[tuple[str, str]], service: str, ignored: Mapping[str, str]) -> list[str]:
    """Pins with a known vulnerability that nobody has looked at; says what was asked."""
    try:
        known = advisories(pins, service)
    except (OSError, ValueError, KeyError) as error:
        print(f"not audited: no advisory service reachable ({service}: {error})")
        return []
    print(f"audited {len(pins)} pins against {service}; {len(ignored)} advisories reviewed")
    return [f"{pin}: {id}" for id, pin in known if id not in ignored]


def advisories(pins: list[tuple[str, str]], service: str) -> list[tuple[str, str]]:
    """(advisory, pin) of every known vulnerability.

    Raises:
        OSError: the service cannot be reached.
        ValueError: what it says is no answer.
    """
    queries = [
        {"package": {"name": name, "ecosystem": "PyPI"}, "version": version.split("+")[0]}
        for name, version in pins
    ]
    request = urllib.request.Request(  # noqa: S310
        service,
        data=json.dumps({"queries": queries}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:  # noqa: S310
        results = json.load(answer)["results"]
    return [
        (str(found["id"]), f"{name}=={version}")
        for (name, version), result in zip(pins, results, strict=True)
        for found in result.get("vulns", ())
    ]


def read_ignored() -> dict[str, str]:
    """Advisories that were looked at and do not concern us, with the reason."""
    lines = (HERE / "reviewed-advisories").read_text("utf8").splitlines()
    texts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return dict(text.split(maxsplit=1) for text in texts)


if __name__ == "__main__":
    sys.exit(main())
