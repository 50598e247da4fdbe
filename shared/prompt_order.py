"""The seeded order in which a run goes through its problems.

The order is endless: epoch after epoch, each a permutation of the task's problems. A *position*
numbers its places, `position = epoch * num_problems + index`.
"""

from __future__ import annotations

import random
from functools import lru_cache


def problem_at(epoch: int, index: int, *, num_problems: int, seed: int) -> int:
    """The problem at place `index` of an epoch, as its number in the task's training split."""
    return _permutation(num_problems, seed, epoch)[index]


@lru_cache(maxsize=4)
def _permutation(num_problems: int, seed: int, epoch: int) -> list[int]:
    order = list(range(num_problems))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order
