"""One rank fails: all raise the same error within a bounded time, and the group can be used afterwards."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks.ranks import Raised, World, is_usable, outcome, rank
from checks.tensors import vector
from torch import Tensor
from torch.func import grad, jacfwd, vmap

import implicitdiff.distributed as dist
from implicitdiff import ConvergenceError, RankError, solvers
from implicitdiff.distributed import psum, pvary, together

Z = torch.zeros(3, dtype=torch.float64)
C = vector(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)


class Unpicklable(Exception):
    """It cannot be restored from its pickle: its constructor takes other arguments than it has."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(one + other)


class Local(Exception):
    pass


def failed(on: int = 1, kind: Callable[..., Exception] = ZeroDivisionError, *text: str) -> None:
    """Raise on one rank."""
    if rank() == on:
        raise kind(*(text or ("in the user's function",)))


class FailsBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> Tensor:
        failed()
        return c


def quartic(w: Tensor) -> Tensor:
    return psum(((pvary(w) - rank()) ** 4).sum())


def failing_after(evaluations: int, fail: Callable[[], None] = failed) -> Callable[[Tensor], Tensor]:
    calls = 0

    def fn(w: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > evaluations:
            fail()
        return quartic(w)

    return fn


def unequal(w: Tensor) -> Tensor:
    """One rank sums a number, the other a vector."""
    squares = (pvary(w) - rank()) ** 2
    return psum(squares.sum()) if rank() == 0 else psum(squares)[0]


def within(body: Callable[[], Any]) -> Any:
    with together():
        return body()


def one_of_two_collectives() -> Any:
    return psum(Z) if rank() == 0 else dist.all_gather(Z)


def lost_pickle() -> Any:
    raise (Local if rank() else ZeroDivisionError)("both fail")


def search_in_lanes(c: Tensor) -> Tensor:
    return solvers.newton(lambda x, c: x**2 - c).run(torch.ones_like(c), c)[0]


# Bodies, the error that both ranks raise, and what its text or its notes say.
FAILURES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "in a function": (lambda: (failed(), psum(Z)), ZeroDivisionError, r"raised on ranks \[1\] of 2"),
    "of the first rank": (lambda: (failed(0), psum(Z)), ZeroDivisionError, r"raised on ranks \[0\] of 2"),
    "after the last collective": (lambda: (psum(Z), failed()), ZeroDivisionError, "in the user's function"),
    "in a search": (lambda: solvers.lbfgs(failing_after(3)).run(Z), ZeroDivisionError, r"ranks \[1\]"),
    "in an implicit derivative": (
        lambda: grad(
            lambda c: (solvers.lbfgs(lambda w, c: FailsBackward.apply(c) @ w + quartic(w)).run(Z, c)[0]).sum()
        )(Z),
        ZeroDivisionError,
        r"ranks \[1\]",
    ),
    "in backward()": (
        lambda: psum(FailsBackward.apply(pvary(Z.clone().requires_grad_())).sum()).backward(),
        ZeroDivisionError,
        r"ranks \[1\]",
    ),
    "under transforms": (
        lambda: vmap(jacfwd(grad(lambda w: (failed(), quartic(w))[1])))(torch.ones(2, 3)),
        ZeroDivisionError,
        r"ranks \[1\]",
    ),
    "in psum_of": (lambda: grad(dist.psum_of(lambda w: (failed(), w.sum())[1]))(Z), ZeroDivisionError, r"ranks \[1\]"),
    "on all ranks": (lambda: failed(rank()), ZeroDivisionError, r"ranks \[0, 1\]"),
    "other errors on all ranks": (lost_pickle, ZeroDivisionError, r"ranks \[0, 1\]"),
    "without a pickle": (lambda: failed(1, Unpicklable, "one, ", "other"), RankError, "Unpicklable: one, other"),
    "a class in a function": (
        lambda: failed(1, type("Hidden", (Exception,), {}), "hidden"),
        RankError,
        "Hidden: hidden",
    ),
    "shapes": (lambda: unequal(Z), RankError, r"rank 0: psum of \(\).*rank 1: psum of \(3,\)"),
    "dtypes": (lambda: psum(Z.float() if rank() else Z), RankError, "rank 1.*float32"),
    "collectives": (one_of_two_collectives, RankError, "rank 0: psum.*rank 1: all_gather"),
    "one leaves early": (lambda: Z if rank() else psum(Z), RankError, "rank 1: the end of `together`"),
    "one more collective": (lambda: (psum(Z), rank() and psum(Z)), RankError, "rank 0: the end of `together`"),
    "other sizes to gather": (lambda: dist.all_gather(Z[: 2 + rank()]), RankError, r"\(2,\).*\(3,\)"),
    "nested": (lambda: within(lambda: (failed(), psum(Z))), ZeroDivisionError, r"ranks \[1\] of 2"),
    "nested, outside": (lambda: (within(lambda: psum(Z)), failed(), psum(Z)), ZeroDivisionError, r"ranks \[1\]"),
    "a vmap inside": (
        lambda: dist.vmap(lambda c: (failed(), c)[1])(C),
        ZeroDivisionError,
        r"ranks \[1\]",
    ),
    "a lane": (
        lambda: dist.vmap(search_in_lanes)(torch.where(torch.arange(8) == 6, -C, C)),
        ConvergenceError,
        "lanes 6: 1 of 8",
    ),
    "lanes of both": (
        lambda: dist.vmap(search_in_lanes)(torch.where(torch.arange(8) % 5 == 1, -C, C)),
        ConvergenceError,
        "lanes 1, 6: 2 of 8",
    ),
}


def failure(name: str, guarded: bool) -> Any:
    body = FAILURES[name][0]
    return outcome((lambda: within(body)) if guarded else body), is_usable()


def check(answers: list[Any], kind: type[Exception], text: str, seconds: float = 5.0) -> None:
    for error, usable in answers:
        assert isinstance(error, Raised), error
        assert error.type is kind, error
        assert re.search(text, "\n".join((error.text, *error.notes))), error
        assert usable
    assert len({(error.text, error.notes) for error, _ in answers}) == 1


@pytest.mark.parametrize("name", FAILURES)
def test_an_error_of_one_rank_is_raised_on_all(on_ranks, name: str) -> None:
    check(on_ranks(2, failure, name, True), *FAILURES[name][1:])


@pytest.mark.parametrize("name", ["a vmap inside", "a lane", "lanes of both"])
def test_vmap_needs_no_together(on_ranks, name: str) -> None:
    check(on_ranks(2, failure, name, False), *FAILURES[name][1:])


def of_four(name: str) -> Any:
    return {
        "two fail": lambda: failed(1) or failed(2, ValueError, "second"),
        "three fail": lambda: failed(rank() or 7),
    }[name]


def failure_of_four(name: str) -> Any:
    return outcome(lambda: within(lambda: (of_four(name)(), psum(Z)))), is_usable()


@pytest.mark.parametrize(("name", "ranks"), [("two fail", r"\[1, 2\]"), ("three fail", r"\[1, 2, 3\]")])
def test_of_several_errors_that_of_the_lowest_rank_is_raised(on_ranks, name: str, ranks: str) -> None:
    check(on_ranks(4, failure_of_four, name), ZeroDivisionError, rf"raised on ranks {ranks} of 4")


# --- going on ---------------------------------------------------------------------------------------------------------


def caught_and_gone_on() -> Any:
    """All ranks take the same branch after an error of one."""
    with together():
        values = []
        for step in range(3):
            try:
                with together():
                    values.append(float(psum(torch.ones(())) + step))
                    if step == 1:
                        failed()
                    values.append(float(psum(torch.ones(()))))
            except ZeroDivisionError:
                values.append(-1.0)
        return values


def test_an_error_that_is_caught_leaves_the_ranks_together(on_ranks) -> None:
    assert on_ranks(2, caught_and_gone_on) == [[2.0, 2.0, 3.0, -1.0, 4.0, 2.0]] * 2


def caught_on_one_rank() -> Any:
    """The error is caught where it is raised, before any other rank has heard of it."""
    with together():
        with contextlib.suppress(ZeroDivisionError):
            failed()
        return float(psum(torch.ones(())))


def test_an_error_that_one_rank_catches_is_its_own(on_ranks) -> None:
    assert on_ranks(2, caught_on_one_rank) == [2.0, 2.0]


def caught_by_all_inside_one_together() -> Any:
    """An error that all ranks have heard of is caught inside, and the body goes on."""
    with together():
        with contextlib.suppress(ZeroDivisionError):
            failed()
            psum(Z)
        return float(psum(torch.ones(())))


def caught_where_it_is_raised() -> Any:
    return outcome(caught_by_all_inside_one_together), is_usable()


def test_an_error_caught_inside_never_leaves_other_values(on_ranks) -> None:
    """The rank that failed catches its own error before it tells, and then comes to another collective."""
    for error, usable in on_ranks(2, caught_where_it_is_raised):
        assert isinstance(error, Raised) and error.type is RankError, error
        assert usable


def unlike_arguments(name: str) -> Any:
    w = torch.ones(3, dtype=torch.float64) * (1 + rank())
    calls: dict[str, Callable[[], Any]] = {
        "an argument": lambda: grad(dist.psum_of(lambda w: (w**2).sum()))(w),
        "captured": lambda: grad(lambda w: dist.psum_of(lambda: (w**2).sum())())(w),
        "backward()": lambda: dist.psum_of(lambda w: (w**2).sum())(w.requires_grad_()).backward(),
        "pmean_of": lambda: grad(dist.pmean_of(lambda w: (w**2).sum()))(w),
        "shapes": lambda: grad(dist.psum_of(lambda w: (w**2).sum()))(w[: 1 + rank()]),
    }
    return outcome(calls[name]), is_usable()


@pytest.mark.parametrize("name", ["an argument", "captured", "backward()", "pmean_of", "shapes"])
def test_a_differentiated_tensor_that_differs_is_refused(on_ranks, name: str) -> None:
    check(on_ranks(2, unlike_arguments, name), RankError, "the same on all ranks")


# --- a rank that is gone ----------------------------------------------------------------------------------------------


def die() -> None:
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def sleep() -> None:
    if rank() == 1:
        time.sleep(60)


def gone(fail: Callable[[], None], guarded: bool) -> Any:
    def body() -> Any:
        return solvers.lbfgs(failing_after(2, fail)).run(Z)

    return outcome((lambda: within(body)) if guarded else body)


@pytest.mark.parametrize("guarded", [True, False], ids=["together", "alone"])
@pytest.mark.parametrize("fail", [die, sleep], ids=["killed", "hanging"])
def test_a_rank_that_is_gone_raises_within_the_timeout(fail, guarded: bool) -> None:
    with World(2, timeout=5.0) as world:
        world.send(gone, fail, guarded)
        error = world.answer(0)
    assert isinstance(error, Raised), error
    assert error.type is RankError and "cannot be used again" in error.text
    assert error.seconds < 12.0


def unguarded(name: str) -> Any:
    return outcome(FAILURES[name][0])


@pytest.mark.parametrize("name", ["in a search", "one leaves early"])
def test_without_together_the_others_raise_within_the_timeout(name: str) -> None:
    with World(2, timeout=3.0) as world:
        answers = world.call(unguarded, name)
    kinds = [answer.type if isinstance(answer, Raised) else None for answer in answers]
    assert RankError in kinds
