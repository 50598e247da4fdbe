"""One log format for every process."""

from __future__ import annotations

import logging
import sys

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def configure_logging() -> None:
    """Log to standard error, INFO and above; libraries from WARNING."""
    logging.basicConfig(level=logging.WARNING, format=FORMAT, stream=sys.stderr, force=True)
    for name in ("services", "shared", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO)
