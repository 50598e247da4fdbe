"""Which rank computes which sequences in which pass, so that all are busy for as long.

A pass costs what its sequences cost: so much a token, and in attention so much a pair of tokens,
so that a long sequence weighs more than its length. Sequences go, dearest first, to the cheapest
micro-batch that still has room (longest processing time first): with n micro-batches the dearest
is within 4/3 of what the best plan could do where room binds nowhere, and in practice, with many
sequences in each, within a few percent. Everything is integer or exact float arithmetic over the
same numbers in the same order, so every rank and every resumed run makes the same plan.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Plan = list[list[list[int]]]
"""`plan[rank][i]` are the row numbers of the rank's i-th micro-batch, perhaps none."""


class PassCost(NamedTuple):
    """Operations of a forward pass, up to a factor; `is_padded` where rows are not packed.

    Attributes:
        per_token: of the layers, for each token of a sequence.
        per_prediction: of the head, for each token of a completion.
        per_pair: of attention, for each token and token before it.
        is_padded: every row of a micro-batch costs as much room as its longest.
    """

    per_token: int
    per_prediction: int = 0
    per_pair: int = 0
    is_padded: bool = False

    def of(self, num_tokens: int, num_predictions: int) -> int:
        """Of a sequence."""
        pairs = num_tokens * (num_tokens + 1) // 2
        return (
            self.per_token * num_tokens
            + self.per_prediction * num_predictions
            + self.per_pair * pairs
        )


class Load(NamedTuple):
    """A sequence to be placed: its tokens, which take room, and its cost."""

    num_tokens: int
    cost: int


def plan_passes(
    loads: Mapping[int, Load], *, num_ranks: int, max_tokens: int, is_padded: bool = False
) -> Plan:
    """The rows, each once, in the fewest micro-batches that hold them, as many on every rank.

    A micro-batch has at most max_tokens, except that a longer row is one by itself. Every rank
    works if there are rows for all; where rows run out, micro-batches are empty.

    Args:
        loads: by row.
        is_padded: a micro-batch takes as much room as if all its rows were as long as its longest.
    """
    order = sorted(loads, key=lambda row: (-loads[row].cost, -loads[row].num_tokens, row))
    total = sum(min(load.num_tokens, max_tokens) for load in loads.values())
    num_rounds = max(1, -(-total // (max_tokens * num_ranks)))
    while (parts := _place(order, loads, num_rounds * num_ranks, max_tokens, is_padded)) is None:
        num_rounds += 1
    parts.sort(key=lambda rows: -sum(loads[row].cost for row in rows))
    plan: Plan = [[] for _ in range(num_ranks)]
    # Micro-batches of one round cost about the same; the ranks take turns at the dearest.
    for number in range(num_rounds):
        of_round = parts[number * num_ranks : (number + 1) * num_ranks]
        for mine, rows in zip(plan, of_round[:: -1 if number % 2 else 1], strict=True):
            mine.append(rows)
    return plan


def rows_by_rank(plans: Sequence[Plan], num_ranks: int) -> list[list[int]]:
    """The rows that each rank passes over in any of the plans, ascending."""
    return [
        sorted(row for plan in plans for rows in plan[rank] for row in rows)
        for rank in range(num_ranks)
    ]


def _place(
    order: Sequence[int],
    loads: Mapping[int, Load],
    num_parts: int,
    max_tokens: int,
    is_padded: bool,
) -> list[list[int]] | None:
    """Each row in the cheapest part with room for it; None if one finds none."""
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    sizes, longest = [0] * num_parts, [0] * num_parts
    by_cost = [(0, part) for part in range(num_parts)]
    for row in order:
        load, full = loads[row], []
        while by_cost:
            cost, part = heapq.heappop(by_cost)
            size = sizes[part] + load.num_tokens
            if is_padded:
                size = max(longest[part], load.num_tokens) * (len(parts[part]) + 1)
            if not parts[part] or size <= max_tokens:
                break
            full.append((cost, part))
        else:
            return None
        parts[part].append(row)
        sizes[part], longest[part] = size, max(longest[part], load.num_tokens)
        for each in [*full, (cost + load.cost, part)]:
            heapq.heappush(by_cost, each)
    return parts
