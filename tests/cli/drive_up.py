"""`isentrope up` with stand-ins for the services; behaviours by name as JSON in the arguments.

python drive_up.py '{"learner": "steps=3", "rollout-0": "", ...}' up FILE ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from services.cli import __main__ as cli
from services.cli.launch import Launch, RunIdentity

STAND_IN = Path(__file__).with_name("stand_in.py")


def main() -> int:
    behaviours: dict[str, str] = json.loads(sys.argv[1])

    def plan(run: RunIdentity) -> list[Launch]:
        return [launch(run, name, words.split()) for name, words in behaviours.items()]

    def launch(run: RunIdentity, name: str, words: list[str]) -> Launch:
        folder = str(run.run_file.parent)
        command = (sys.executable, str(STAND_IN), name.split("-")[0], name, folder, *words)
        role = name.split("-")[0]
        return Launch(name, role, command, {"REDIS_URL": run.redis_url_of(role)})

    return cli.main(sys.argv[2:], plan=plan)


if __name__ == "__main__":
    sys.exit(main())
