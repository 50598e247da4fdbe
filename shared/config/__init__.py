"""The run file: one TOML document that every service of a run reads.

Importing this package loads neither torch nor vllm, so `--help` and a config check are instant.
"""

from shared.config.environment import Environment
from shared.config.load import (
    load_run,
    load_run_with_notices,
    parse_run,
    parse_run_with_notices,
)
from shared.config.run import RunConfig

__all__ = [
    "Environment",
    "RunConfig",
    "load_run",
    "load_run_with_notices",
    "parse_run",
    "parse_run_with_notices",
]
