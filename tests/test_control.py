"""The branch and the loop of a step, executed and handed to a recorder."""

from __future__ import annotations

import threading
from typing import NamedTuple

import pytest
import torch
from torch.func import grad, vmap

from implicitdiff.solvers._loop.control import if_any, recorded_by, repeat


class Countdown(NamedTuple):
    left: torch.Tensor
    passes: torch.Tensor


def lower(c):
    going = c.left > 0
    return Countdown(torch.where(going, c.left - 1, c.left), torch.where(going, c.passes + 1, c.passes))


def going(c):
    return c.left > 0


def start(*left):
    return Countdown(torch.tensor(left), torch.zeros(len(left), dtype=torch.int64))


class Log:
    """A recorder that notes what it is asked, and executes it."""

    def __init__(self):
        self.asked = []

    def if_any(self, flag, then, carry):
        self.asked.append(("if_any", flag, then, carry))
        return then(carry)

    def repeat(self, body, carry, flag, at_most):
        self.asked.append(("repeat", body, carry, flag, at_most))
        return body(carry)


@pytest.mark.parametrize("flag, runs", [([False, False], 0), ([False, True], 1), ([[True, False], [False, False]], 1)])
def test_a_branch_runs_once_if_any_lane_asks(flag, runs):
    calls = []
    carry = {"x": torch.ones(2), "y": [torch.zeros(2)]}
    result = if_any(torch.tensor(flag), lambda c: calls.append(c) or {"x": c["x"] + 1, "y": c["y"]}, carry)
    assert len(calls) == runs
    assert (result is carry) == (not runs)
    assert torch.equal(result["x"], torch.full((2,), 1.0 + runs))


def test_a_loop_runs_until_no_lane_asks():
    result = repeat(lower, start(2, 0, 5), going, 100)
    assert result.left.tolist() == [0, 0, 0] and result.passes.tolist() == [2, 0, 5]


@pytest.mark.parametrize("at_most, passes", [(3, [2, 3]), (1, [1, 1]), (0, [0, 0]), (-1, [0, 0])])
def test_a_loop_ends_after_so_many_passes(at_most, passes):
    assert repeat(lower, start(2, 9), going, at_most).passes.tolist() == passes


def test_a_loop_asks_before_each_pass_and_not_after_the_last():
    asked = []
    repeat(lower, start(9), lambda c: asked.append(int(c.left)) or c.left > 0, 3)
    assert asked == [9, 8, 7]
    carry = start(0, 0)
    assert repeat(lower, carry, going, 3) is carry


def test_any_lane_of_a_vmap_asks():
    def doubled(x):
        twice = if_any(x > 1, lambda y: torch.where(x > 1, 2 * y, y), x)
        return repeat(lambda y: torch.where(y < 8, 2 * y, y), twice, lambda y: y < 8, 2)

    x = torch.tensor([1.0, 3.0])
    assert vmap(doubled)(x).tolist() == [4.0, 12.0]
    assert vmap(grad(doubled))(x).tolist() == [4.0, 4.0]


def test_a_recorder_gets_the_branch_and_the_loop():
    log, flag, carry = Log(), torch.tensor([False]), start(2)
    with recorded_by(log):
        assert if_any(flag, lower, carry).passes.tolist() == [1]
        assert repeat(lower, carry, going, 7).passes.tolist() == [1]
    assert log.asked == [("if_any", flag, lower, carry), ("repeat", lower, carry, going, 7)]
    assert repeat(lower, carry, going, 7).passes.tolist() == [2]


def test_a_recorder_inside_of_another_gives_way_at_its_end():
    outer, inner, carry = Log(), Log(), start(2)
    with recorded_by(outer):
        with pytest.raises(KeyError), recorded_by(inner):
            if_any(going(carry), lower, carry)
            raise KeyError
        with recorded_by(None):
            assert if_any(torch.tensor([False]), lower, carry) is carry
        assert not outer.asked
        if_any(going(carry), lower, carry)
    assert len(inner.asked) == len(outer.asked) == 1


def test_a_recorder_belongs_to_its_thread():
    results = []
    with recorded_by(Log()):
        thread = threading.Thread(target=lambda: results.append(repeat(lower, start(2), going, 7)))
        thread.start()
        thread.join()
    assert results[0].passes.tolist() == [2]
