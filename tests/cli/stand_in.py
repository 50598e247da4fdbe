"""A service without a model: it holds its lease, answers its calls, and ends as it is told to.

    python stand_in.py ROLE NAME RUN_FOLDER [behaviour ...]

Behaviours: `all=N` begin once N stand-ins are up; `asked=N` and once a learner was asked for its
status N times more; `steps=N` write that many rows, then end; `seconds=S` between rows;
`die=STATUS` end with it after printing 30 lines; `refuse` end with 2 at once; `mute` never hold a
lease; `stubborn` ignore SIGTERM; `child` start a process that does.

What it does is noted in RUN_FOLDER/events, which the tests read.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from protos import (
    learner_pb2,
    learner_pb2_grpc,
    rollout_pb2,
    rollout_pb2_grpc,
    verifier_pb2,
    verifier_pb2_grpc,
)
from shared.lease import Registry
from shared.redis_connection import connect
from shared.rpc import serve

SLEEPER = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(120)"


class Learner(learner_pb2_grpc.LearnerServicer):
    step = 0
    times_asked = 0

    async def GetStatus(self, request: Any, context: Any) -> Any:
        self.times_asked += 1
        return learner_pb2.GetLearnerStatusResponse(
            step=self.step,
            num_steps=3,
            policy_version=self.step,
            activity="training",
            metrics={"entropy": 0.2},
            queue_depths={"prompts": 3, "scored": 1},
        )


class Rollout(rollout_pb2_grpc.RolloutServicer):
    async def GetStatus(self, request: Any, context: Any) -> Any:
        return rollout_pb2.GetRolloutStatusResponse(
            state=rollout_pb2.REPLICA_STATE_SERVING,
            policy_version=4,
            groups_sampled=12,
            mixed_version_completions=7,
        )


class Verifier(verifier_pb2_grpc.VerifierServicer):
    async def GetStatus(self, request: Any, context: Any) -> Any:
        return verifier_pb2.GetVerifierStatusResponse(groups_scored=9)


SERVICERS: dict[str, tuple[Any, Any]] = {
    "learner": (Learner, learner_pb2_grpc.add_LearnerServicer_to_server),
    "rollout": (Rollout, rollout_pb2_grpc.add_RolloutServicer_to_server),
    "verifier": (Verifier, verifier_pb2_grpc.add_VerifierServicer_to_server),
}


class StandIn:
    def __init__(self, role: str, name: str, folder: Path, options: dict[str, str]) -> None:
        self.role, self.name, self.folder, self.options = role, name, folder, options
        self.stop = asyncio.Event()
        servicer, self.add = SERVICERS[role]
        self.servicer = servicer()

    def note(self, text: str) -> None:
        with (self.folder / "events").open("a") as file:
            file.write(f"{text}\n")

    async def run(self) -> int:
        is_stubborn = "stubborn" in self.options
        handler = (lambda: None) if is_stubborn else self.stop.set
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, handler)
        self.note(f"pid {os.getpid()}")
        self.note(f"name {self.name} {os.getpid()}")
        if "child" in self.options:
            child = await asyncio.create_subprocess_exec(sys.executable, "-c", SLEEPER)
            self.note(f"pid {child.pid}")
        if "refuse" in self.options:
            print("a line before\nerror: model.path = 'none': no such model", flush=True)
            return 2
        if "mute" in self.options:
            await self.stop.wait()
            return 0
        return await self.serve()

    async def serve(self) -> int:
        client = connect(os.environ["REDIS_URL"])
        registry = Registry(client, prefix=f"isentrope:{{{self.folder.name}}}:")
        serving = serve(
            host="127.0.0.1",
            port=0,
            port_key="port",
            services=[self.role],
            add=lambda server: self.add(self.servicer, server),
        )
        async with serving as server:
            address = f"127.0.0.1:{server.port}"
            lease = registry.hold(
                self.role,  # type: ignore[arg-type]
                self.name,
                address=address,
                metrics_address="",
                seconds=10,
            )
            async with lease:
                await server.set_serving(True)
                self.note(f"up {self.name}")
                status = await self.work()
                self.note(f"end {self.name}")
        await client.aclose()
        return status

    async def work(self) -> int:
        while self.num_up() < int(self.options.get("all", 0)) and not self.stop.is_set():
            await self.pause(0.05)
        if "asked" in self.options:
            wanted = self.servicer.times_asked + int(self.options["asked"])
            while self.servicer.times_asked < wanted and not self.stop.is_set():
                await self.pause(0.05)
        if "steps" in self.options:
            await self.train()
        elif "die" in self.options:
            print("\n".join(f"line {number}" for number in range(30)), flush=True)
            return int(self.options["die"])
        else:
            await self.stop.wait()
        return 0

    async def train(self) -> None:
        path = self.folder / "metrics.jsonl"
        done = len(path.read_text().splitlines()) if path.exists() else 0
        for step in range(done + 1, int(self.options["steps"]) + 1):
            with path.open("a") as file:
                file.write(json.dumps(row(step)) + "\n")
            self.servicer.step = step
            self.note("row")
            await self.pause(float(self.options.get("seconds", 0.1)))
            if self.stop.is_set():
                self.note("checkpoint")
                return

    async def pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self.stop.wait()
        except TimeoutError:
            return

    def num_up(self) -> int:
        lines = (self.folder / "events").read_text().splitlines()
        return sum(line.startswith("up ") for line in lines)


def row(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "reward_mean": step / 10,
        "entropy": 0.3 / step,
        "tokens": 900,
        "seconds": 1.5,
        "staleness_mean": 0.5,
        "staleness_max": 2,
        "staleness_counts": {"0": 8, "2": 4},
        "eval_score": step / 20,
        "eval_stderr": 0.01,
    }


if __name__ == "__main__":
    given = dict(word.partition("=")[::2] for word in sys.argv[4:])
    stand_in = StandIn(sys.argv[1], sys.argv[2], Path(sys.argv[3]), given)
    sys.exit(asyncio.run(stand_in.run()))
