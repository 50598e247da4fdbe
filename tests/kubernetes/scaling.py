"""What KEDA asks, and whom: it would not say that nobody has that, or that it is another run's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from shared.config import RunConfig, parse_run
from shared.errors import ConfigError
from shared.redis_stream import key_prefix
from shared.stream import ROLLOUTS
from tests.kubernetes.manifests import Manifest, named, of_kind, title
from tests.kubernetes.run_file import run_files
from tests.observability.catalogue import catalogue, faults
from tests.observability.promql import selectors

_UNGUARDED = re.compile(r"/(?!\s*\(.* > 0\))", re.DOTALL)
"""A division whose divisor may be 0."""


def problems(manifests: Sequence[Manifest]) -> Iterator[str]:
    """One line for each question that would be answered wrongly, or for another namespace."""
    namespaces = named(manifests, "Namespace")
    for scaled in of_kind(manifests, "ScaledObject"):
        for trigger in scaled["spec"]["triggers"]:
            asked = trigger["metadata"]
            match trigger["type"]:
                case "redis-streams":
                    found = [*_address(asked, namespaces), *_stream(asked, manifests)]
                case "prometheus":
                    found = list(_query(asked, namespaces))
                case other:
                    found = [f"trigger {other!r} is one that nothing checks"]
            yield from (f"{title(scaled)}: {problem}" for problem in found)


def _address(asked: Manifest, namespaces: set[str]) -> Iterator[str]:
    """KEDA looks for it from a namespace of its own."""
    wanted = {f"redis.{namespace}.svc.cluster.local:6379" for namespace in namespaces}
    if {asked["address"]} != wanted:
        yield f"address {asked['address']!r}, and Redis is at {' and '.join(sorted(wanted))}"


def _stream(asked: Manifest, manifests: Sequence[Manifest]) -> Iterator[str]:
    """A wrong key is an empty stream to KEDA, which would scale to the least and say nothing."""
    for config in _configs(manifests):
        wanted = key_prefix(config.run.name) + ROLLOUTS
        if asked.get("stream") != wanted:
            yield f"stream {asked.get('stream')!r}, and the run's is {wanted!r}"
        if "consumerGroup" in asked or "streamLength" not in asked:
            yield "only streamLength counts what waits and what is in work"
        elif int(asked["streamLength"]) > config.verifier.max_concurrent_groups:
            yield "streamLength is above verifier.max_concurrent_groups"


def _configs(manifests: Sequence[Manifest]) -> Iterator[RunConfig]:
    for text in run_files(manifests):
        try:
            yield parse_run(text)
        except ConfigError:
            continue  # told by the check of the run file


def _query(asked: Manifest, namespaces: set[str]) -> Iterator[str]:
    query = asked["query"]
    for selector in selectors(query):
        namespace = selector.matchers.get("namespace")
        if {namespace} != namespaces:
            here = " and ".join(sorted(namespaces))
            yield f"asks for {selector.metric} of namespace {namespace!r}, and this is {here!r}"
    yield from faults(re.sub(r'namespace="[^"]*",?', "", query), catalogue())
    if _UNGUARDED.search(query):
        yield "0 / 0 is NaN, a large negative number to some versions of KEDA: divide by (... > 0)"
    if asked.get("ignoreNullValues") != "false":
        yield "no answer counts as 0 unless ignoreNullValues is 'false'"
