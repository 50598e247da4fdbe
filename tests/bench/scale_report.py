"""The scale benchmark as a text and a figure: what was measured, then what is reckoned from it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from tests.bench.scale_counts import Count
from tests.bench.scale_crew import GROUP_SIZE, GROUPS_PER_BATCH, MAX_STALENESS
from tests.bench.scale_model import FAR, Model
from tests.bench.scale_point import LEARNER, REDIS, REPLICAS, VERIFIER, Point

BLUE, ORANGE = "#0072B2", "#E69F00"
PARTS = (LEARNER, REDIS, VERIFIER, REPLICAS)


def report(points: Sequence[Point], counts: Sequence[Count], *, setting: str, figure: str) -> str:
    """Markdown."""
    loads = [point.load_average for point in points]
    sections = [
        "# Scale: one Redis, one control plane, many replicas",
        f"{setting}; load average {min(loads):.0f} to {max(loads):.0f} meanwhile, of which this"
        " benchmark is a part.",
        f"![Publish time and groups a second by number of replicas]({figure})",
        "## Measured",
        _promises(points),
        _by_the_clock(points),
        _publications(points),
        _cpu(points),
        _memory(points),
        _counts(counts),
        "## Model",
        _model(Model(points, counts)),
    ]
    return "\n\n".join(sections) + "\n"


def draw(points: Sequence[Point], path: Path) -> None:
    """Publish time, and groups a second, by number of replicas."""
    figure = Figure(figsize=(9.0, 3.8), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    alike = [point for point in points if point.case[2:] == points[0].case[2:]]
    for layout, colour in (("pairs", BLUE), ("one", ORANGE)):
        some = [point for point in alike if point.case.layout == layout]
        numbers = [point.case.replicas for point in some]
        medians = [statistics.median(point.publish_seconds) for point in some]
        below = [
            middle - min(point.publish_seconds) for middle, point in zip(medians, some, strict=True)
        ]
        above = [
            max(point.publish_seconds) - middle for middle, point in zip(medians, some, strict=True)
        ]
        name = {"pairs": "a group of two for each", "one": "one group of all"}[layout]
        left.errorbar(
            numbers, medians, yerr=[below, above], fmt="o-", color=colour, capsize=3, label=name
        )
        rates = [point.groups_per_second for point in some]
        right.plot(numbers, rates, "o-", color=colour, label=name)
    mebibytes = points[0].case.mebibytes
    left.set_title(f"publishing {mebibytes} MiB to all: median, least, most")
    left.set_ylabel("seconds")
    right.set_title(f"groups of {GROUP_SIZE} x {points[0].case.tokens} tokens, all streams")
    right.set_ylabel("groups a second")
    for axes in (left, right):
        axes.set_xlabel("replicas")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    left.legend(frameon=False)
    figure.savefig(path)


def _promises(points: Sequence[Point]) -> str:
    trained = sum(point.num_trained for point in points)
    lost = sum(point.num_lost for point in points)
    over = sum(point.num_violations for point in points)
    dropped = sum(sum(point.dropped.values()) for point in points)
    refits = sum(point.failed_refits for point in points)
    most = max(point.most_staleness for point in points)
    return (
        f"{trained} groups trained, **{lost} lost, {over} over the bound** of staleness"
        f" {MAX_STALENESS} (the most was {most}), {dropped} dropped and issued again, {refits}"
        " refits failed. A group is lost if it was issued and never came: at the end of each case"
        " nothing new is issued until nothing is out."
    )


def _by_the_clock(points: Sequence[Point]) -> str:
    head = (
        "By the clock of the cores that all parts share: `groups/s` with no publication,"
        f" `training` with one after each {GROUPS_PER_BATCH} groups; `first` forms the broadcast"
        " groups (torch's store looks the name of each connection up: a DNS server that drops"
        " queries adds 5 s and more); `newcomer` is from a replica's lease to its serving, in"
        " which the learner looks once a second."
    )
    names = ("case", "groups/s", "training", "first s", "publish s", "newcomer s", "load")
    rows = [
        (
            _name(point),
            f"{point.groups_per_second:.0f}",
            f"{point.training_groups_per_second:.0f}",
            f"{point.first_publish_seconds:.2f}",
            _spread(point.publish_seconds),
            _spread(point.catch_up_seconds),
            f"{point.load_average:.0f}",
        )
        for point in points
    ]
    return f"{head}\n\n{_table(names, rows)}"


def _publications(points: Sequence[Point]) -> str:
    head = (
        "Where a publication's time goes (medians), and the CPU it takes; `begin` is asking each"
        " replica to receive, `load` its checksum, swap, canary and the two calls for them."
    )
    names = ("case", "begin s", "broadcast s", "load s", "learner CPU ms", "replicas CPU ms")
    rows = [
        (
            _name(point),
            *(f"{point.publish_parts[part]:.3f}" for part in ("begin", "broadcast", "load")),
            f"{1000 * point.publish_cpu[LEARNER]:.0f}",
            f"{1000 * point.publish_cpu[REPLICAS]:.0f}",
        )
        for point in points
    ]
    return f"{head}\n\n{_table(names, rows)}"


def _cpu(points: Sequence[Point]) -> str:
    head = (
        "CPU: milliseconds a group while groups flow, and per mille of a core while nothing"
        " happens. The replicas' includes the simulated engines."
    )
    names = ("case", *(f"{part} ms" for part in PARTS), *(f"{part} idle" for part in PARTS))
    rows = [
        (
            _name(point),
            *(f"{point.group_cpu_ms[part]:.2f}" for part in PARTS),
            *(f"{1000 * point.idle_cpu[part]:.0f}" for part in PARTS),
        )
        for point in points
    ]
    return f"{head}\n\n{_table(names, rows)}"


def _memory(points: Sequence[Point]) -> str:
    head = "Memory, threads and open files; `data` is the most that Redis' data took."
    names = (
        "case", "learner MiB", "peak", "threads", "files", "Redis MiB", "data", "connections"
    )  # fmt: skip
    keys = (
        "learner_mib", "learner_peak_mib", "learner_threads", "learner_files", "redis_mib",
        "redis_streams_mib", "redis_clients",
    )  # fmt: skip
    rows = [(_name(point), *(f"{point.memory[key]:.0f}" for key in keys)) for point in points]
    return f"{head}\n\n{_table(names, rows)}"


def _counts(counts: Sequence[Count]) -> str:
    head = (
        "Leases and holders without replicas, measured up to 10,000: milliseconds of one look by"
        " the clock, of CPU of who looks, of CPU of Redis."
    )
    names = ("how many", "leases", "CPU", "Redis", "holders", "CPU", "Redis", "depth", "CPU")
    rows = [(str(each.number), *(f"{value:.1f}" for value in each[1:9])) for each in counts]
    return f"{head}\n\n{_table(names, rows)}"


def _model(model: Model) -> str:
    fleet = model.fleet
    head = (
        "Reckoned, **not measured**, from lines through the CPU seconds above. Assumed: a replica"
        f" makes {fleet.tokens_per_second:.0f} tokens/s in groups of {fleet.tokens_per_group:.0f},"
        f" the weights are {fleet.model_gb:g} GB, the learner's link {fleet.link_gb_per_second:g}"
        f" GB/s, a step {fleet.step_seconds:g} s of which publishing may take a tenth, and"
        " learner, Redis and replicas have hosts of their own. Shares are of one core, and"
        " beyond 70 % a thread queues."
    )
    return "\n\n".join([head, _far(model), _limits(model)])


def _far(model: Model) -> str:
    rows: list[tuple[str, Callable[[int], str]]] = [
        ("groups/s to carry", lambda n: f"{model.fleet.groups_per_second(n):.0f}"),
        ("Redis' thread: groups", lambda n: f"{model.groups_share(REDIS, n):.1%}"),
        ("Redis' thread: idle polls, leases", lambda n: f"{model.idle[REDIS].at(n):.1%}"),
        ("Redis' thread: looks at leases", lambda n: f"{model.looks_share(n):.1%}"),
        ("Redis' thread: readers, if all wait", lambda n: f"{model.waiting_share(n):.1%}"),
        ("learner's loop", lambda n: f"{model.learner_share(n):.1%}"),
        ("one verifier's loop, scoring apart", lambda n: f"{model.groups_share(VERIFIER, n):.1%}"),
        ("a copy to each, wire alone", lambda n: f"{model.pairs_seconds(n):.0f} s"),
        ("learner's CPU a publication", lambda n: f"{model.publish_cpu.at(n):.1f} s"),
        ("learner's memory beside the copy", lambda n: f"{_mebibytes(model, n):.0f} MiB"),
        ("learner's threads", lambda n: f"{model.memory['learner_threads'].at(n):.0f}"),
        ("learner's open files", lambda n: f"{model.memory['learner_files'].at(n):.0f}"),
        ("Redis' connections", lambda n: f"{model.memory['redis_clients'].at(n):.0f}"),
    ]
    cells = [(f"{name} (model)", *(value(number) for number in FAR)) for name, value in rows]
    return _table(("replicas", *(f"{number:,}" for number in FAR)), cells)


def _limits(model: Model) -> str:
    rows = [
        (
            limit.name,
            "never" if math.isinf(limit.replicas) else f"{_rounded(limit.replicas):,}",
            limit.reckoned,
            limit.lifted_by,
        )
        for limit in model.limits()
    ]
    names = ("what ends the growth, soonest first (model)", "at replicas", "from", "lifted by")
    return _table(names, rows)


def _mebibytes(model: Model, replicas: int) -> float:
    return model.memory["learner_mib"].at(replicas)


def _rounded(number: float) -> int:
    """Two digits: no model knows more."""
    return round(int(number), min(0, 2 - len(str(int(number)))))


def _name(point: Point) -> str:
    case = point.case
    return f"{case.replicas} {case.layout}, {case.mebibytes} MiB, {case.tokens} tokens"


def _spread(seconds: Sequence[float]) -> str:
    if not seconds:
        return ""
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
