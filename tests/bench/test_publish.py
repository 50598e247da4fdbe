from __future__ import annotations

import io

import pytest
from rich.console import Console

from shared.buckets import plan_buckets
from tests.bench.benchmark import Progressing
from tests.bench.publish import CASES, table
from tests.bench.publish_pause import Update, pause_row
from tests.bench.publish_wire import OURS, PLAIN, QUEUED, Case, Cost, measure, measure_parts, row


def test_a_case_is_of_the_size_that_it_says() -> None:
    for case in CASES:
        buckets = plan_buckets(case.manifest, bucket_bytes=case.bucket_bytes)
        num_bytes = sum(bucket.num_bytes for bucket in buckets)
        assert num_bytes / 2**20 == pytest.approx(case.mebibytes, rel=0.02)
        assert max(bucket.num_bytes for bucket in buckets) <= case.bucket_bytes


def test_half_the_seconds_are_twice_the_ratio() -> None:
    plain = [Cost(2.0, 1.0), Cost(4.0, 1.0), Cost(2.0, 1.0)]
    queued = [Cost(1.5, 1.0)] * 3
    ours = [Cost(1.0, 3.0), Cost(1.0, 3.0), Cost(1.0, 3.0)]
    made = row(CASES[0], 10**9, {PLAIN: plain, QUEUED: queued, OURS: ours})
    assert (made.ratio, made.ratio_low, made.ratio_high) == (2.0, 2.0, 4.0)
    assert made.ratio_to_queued == 1.5
    assert (made.plain_gb_per_second, made.ours_gb_per_second) == (0.5, 1.0)
    assert (made.plain_cpu_seconds, made.ours_cpu_seconds) == (1.0, 3.0)
    console = Console(file=io.StringIO(), width=120)
    console.print(table([made], "caption"))
    assert isinstance(console.file, io.StringIO) and "2.00 to 4.00" in console.file.getvalue()


def test_tokens_lost_are_those_of_the_quiet_rate_that_were_not_made() -> None:
    update = Update(
        plain_seconds=0.1,
        receive_seconds=0.3,
        load_seconds=0.1,
        pause_seconds=0.2,
        total_seconds=0.5,
        rate=100.0,
        tokens=20,
    )
    made = pause_row([update] * 3, megabytes=1)
    assert made.tokens_lost == made.tokens_lost_low == 30.0
    assert made.pause_share == pytest.approx(0.4)


def test_every_kind_of_transfer_reaches_two_processes() -> None:
    case = Case(mebibytes=1, dtype="bfloat16", bucket_mib=1, receivers=2)
    with Progressing(Console(file=io.StringIO()), 2) as progress:
        made = measure(case, 1, progress)
    assert made.pairs == 1 and made.ratio > 0 and made.ours_cpu_seconds > 0
    assert all(rate > 0 for rate in measure_parts(case, 1).values())
