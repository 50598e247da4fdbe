"""A service without a model: it holds its lease, answers its calls, and ends as it is told to.

    python stand_in.py ROLE NAME RUN_FOLDER [behaviour ...]

Behaviours: `steps=N` learner: write N rows, then end; `die=STATUS` once all are up, after printing
lines; `refuse` end with 2 at once; `stubborn` ignore SIGTERM; `child` start a process that ignores
SIGTERM; `seconds=S` between rows.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from protos import (
    learner_pb2,
    learner_pb2_grpc,
    rollout_pb2,
    rollout_pb2_grpc,
    verifier_pb2,
    verifier_pb2_grpc,
)
from shared.lease import Registry
from shared.rpc import serve
from shared.stream import connect


class Learner(learner_pb2_grpc.LearnerServicer):
    step = 0

    async def GetStatus(self, request, context):  # type: ignore[no-untyped-def]
        return learner_pb2.GetLearnerStatusResponse(
            step=self.step, num_steps=5, policy_version=self.step, activity="training",
            metrics={"entropy": 0.2}, queue_depths={"prompts": 3, "scored": 1},
        )  # fmt: skip


class Rollout(rollout_pb2_grpc.RolloutServicer):
    async def GetStatus(self, request, context):  # type: ignore[no-untyped-def]
        return rollout_pb2.GetRolloutStatusResponse(
            replica="r", state=rollout_pb2.REPLICA_STATE_SERVING, policy_version=4,
            groups_sampled=12, mixed_version_completions=7,
        )  # fmt: skip


class Verifier(verifier_pb2_grpc.VerifierServicer):
    async def GetStatus(self, request, context):  # type: ignore[no-untyped-def]
        return verifier_pb2.GetVerifierStatusResponse(replica="v", groups_scored=9)


def note(folder: Path, text: str) -> None:
    """One line in the order of events, which the tests read."""
    with (folder / "events").open("a") as file:
        file.write(f"{text}\n")


async def main() -> int:
    role, name, folder, given = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4:]
    options = dict(word.partition("=")[::2] for word in given)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, (lambda: None) if "stubborn" in options else stop.set)
    note(folder, f"pid {os.getpid()}")
    if "child" in options:
        quiet = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
        note(folder, f"pid {subprocess.Popen([sys.executable, '-c', quiet]).pid}")
    servicer = {"learner": Learner, "rollout": Rollout, "verifier": Verifier}[role]()
    add = {
        "learner": learner_pb2_grpc.add_LearnerServicer_to_server,
        "rollout": rollout_pb2_grpc.add_RolloutServicer_to_server,
        "verifier": verifier_pb2_grpc.add_VerifierServicer_to_server,
    }[role]
    client = connect(os.environ["REDIS_URL"])
    registry = Registry(client, prefix=f"isentrope:{{{folder.name}}}:")
    status = 0
    async with (
        serve(
            host="127.0.0.1", port=0, port_key="p", services=[role], add=lambda s: add(servicer, s)
        ) as server,
        registry.hold(
            role, name, address=f"127.0.0.1:{server.port}", metrics_address="", seconds=10
        ),
    ):
        await server.set_serving(True)
        note(folder, f"up {name}")
        await until(folder, "all up", int(options.get("all", 0)))
        if "steps" in options:
            await train(folder, servicer, options, stop)
        elif "die" in options:
            print("\n".join(f"line {number}" for number in range(30)))
            status = int(options["die"])
        else:
            await stop.wait()
        note(folder, f"end {name}")
    await client.aclose()
    return status


async def until(folder: Path, _: str, number: int) -> None:
    """Wait until `number` stand-ins are up."""
    while sum(line.startswith("up ") for line in (folder / "events").read_text().splitlines()) < (
        number
    ):
        await asyncio.sleep(0.05)


async def train(folder: Path, servicer: Learner, options: dict[str, str], stop: asyncio.Event):  # type: ignore[no-untyped-def]
    """Write a row now and then; end with the last one or with SIGTERM."""
    path = folder / "metrics.jsonl"
    done = len(path.read_text().splitlines()) if path.exists() else 0
    for step in range(done + 1, int(options["steps"]) + 1):
        with path.open("a") as file:
            file.write(json.dumps({
                "step": step, "reward_mean": step / 10, "entropy": 0.3 - step / 50, "tokens": 900,
                "seconds": 1.5, "staleness_mean": 0.5, "staleness_max": 2, "eval_score": step / 20,
                "eval_stderr": 0.01, "staleness_counts": {"0": 8, "2": 4}, "time": time.time(),
            }) + "\n")  # fmt: skip
        servicer.step = step
        try:
            async with asyncio.timeout(float(options.get("seconds", 0.2))):
                await stop.wait()
        except TimeoutError:
            continue
        note(folder, f"checkpoint {step}")
        return


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
