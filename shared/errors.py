"""Everything that can go wrong between services, in one tree.

    IsentropeError
    ├── ConfigError          the run file, the environment or a command line is wrong
    ├── StartError           something the run needs is not there: model, Redis, port
    ├── PeerError            another process did not do its part
    │   ├── BroadcastError   a weight transfer failed or ran out of time
    │   └── StreamError      Redis refused, vanished, or held what cannot be decoded
    ├── EngineError          vLLM or DeepSpeed failed inside this process
    └── CheckpointError      a checkpoint is missing, damaged or of another run

Messages name the value and the remedy. A `ValueError` stays the word for a bad argument.
"""

from __future__ import annotations


class IsentropeError(Exception):
    """Base of every error this project raises on purpose."""

    exit_code = 1


class ConfigError(IsentropeError):
    """The run file, the environment or a command line is wrong."""

    exit_code = 2


class StartError(IsentropeError):
    """Something the run needs before it can start is missing or taken."""


class PeerError(IsentropeError):
    """Another process did not do its part.

    Attributes:
        status: one word for what happened, gRPC's where there is one (`DEADLINE_EXCEEDED`), or
            empty.
    """

    def __init__(self, message: str, *, status: str = "") -> None:
        super().__init__(message)
        self.status = status


class BroadcastError(PeerError):
    """A weight transfer failed or ran out of time."""


class StreamError(PeerError):
    """Redis refused, vanished, or held what cannot be decoded."""


class EngineError(IsentropeError):
    """vLLM or DeepSpeed failed inside this process."""


class CheckpointError(IsentropeError):
    """A checkpoint is missing, damaged, or belongs to another run."""
