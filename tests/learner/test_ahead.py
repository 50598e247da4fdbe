from __future__ import annotations

import threading

import pytest

from services.learner.ahead import made_ahead

PATIENCE_SECONDS = 120.0


def test_the_first_is_used_while_the_others_are_made() -> None:
    used, order = threading.Event(), []

    def make(number: int) -> int:
        order.append(number)
        assert number == 0 or used.wait(PATIENCE_SECONDS)
        return 10 * number

    with made_ahead(make, range(3), name="t") as made:
        assert made[0] == 0
        used.set()
        assert list(made) == [0, 10, 20]
        assert made[1:] == (10, 20)
    assert (len(made), order) == (3, [0, 1, 2])


def test_an_error_of_the_making_is_raised_where_the_thing_is_used() -> None:
    with made_ahead(lambda number: 1 // number, [1, 0], name="t") as made:
        assert made[0] == 1
        with pytest.raises(ZeroDivisionError):
            made[1]
