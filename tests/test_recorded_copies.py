"""Recorded steps whose values are copied: carried tensors that change places, branches and loops that assign."""

from __future__ import annotations

import pytest
import torch
from checks.compiled import needs_cpu, recorded_once

from implicitdiff._recorded.step import Parts, record_step
from implicitdiff._torch.control import if_any, recorded_by, repeat

pytestmark = needs_cpu
F64 = torch.float64
LIMITS = torch.tensor([3, 1, 5, 2, 4, 3, 6, 1, 2, 5, 3])
"""The iterations of each lane."""


def odd(count):
    return count % 2 == 1


def masked(count, new, old):
    return torch.where(~odd(count).reshape(-1, *(1,) * (new.dim() - 1)), old, new)


def halved(x, y, count):
    def body(c):
        x, y, left = c
        on = (left > 0)[:, None]
        return torch.where(on, y, x), torch.where(on, x / 2, y), left - 1

    return repeat(body, (x, y, count), lambda c: c[2] > 0, 4)[:2]


def computed_before(x, y, count):
    new = masked(count, x * y, y)
    return if_any(odd(count), lambda c: (c[0] + 1 * masked(count, x, 0 * x), new), (x, y))


def old_value_used(x, y, count):
    def assign(c):
        new = masked(count, c[0] * 2, c[0])
        return new, masked(count, c[0] + new, c[1])

    return if_any(odd(count), assign, (x, y))


def used_after_a_branch(x, y, count):
    twice = x * 2
    new, y = if_any(odd(count), lambda c: (masked(count, -c[0], c[0]), c[1]), (twice, y))
    return new + twice, y


def times_a_matrix(x, y, count):
    one = torch.eye(x.shape[1], dtype=x.dtype).expand(len(x), -1, -1)
    matrix = torch.where(odd(count)[:, None, None], one.roll(1, 2) + one, one)
    return if_any(odd(count), lambda c: ((matrix @ c[0][:, :, None])[..., 0], c[1]), (x, y))


def asked_and_assigned(x, y, count):
    grown = []

    def grows(c):
        on = c.abs().amax(dim=1) < 50
        grown.append(torch.where(on[:, None], c * 2, c))
        return on

    return repeat(lambda c: grown[-1], x, grows, 2), y


def transposed(x, y):
    return x.reshape(-1, 2, 2).mT, y


def nested(x, y, count):
    def outer(c):
        a, b = if_any(count == 3, lambda c: (torch.where((count == 3)[:, None], c[1] + 1, c[0]), c[1]), c)
        return masked(count, b, a), masked(count, a - b, b)

    return if_any(odd(count), outer, (x, y))


def in_branch(assign):
    """A step that assigns where the count is odd, by a branch."""

    def step(x, y, count):
        def then(c):
            pairs = zip(assign(*c), c, strict=True)
            return tuple([masked(count, new, old.reshape(new.shape)).reshape(old.shape) for new, old in pairs])

        return if_any(odd(count), then, (x, y))

    return step


STEPS = {
    "places that change": lambda x, y, count: (y, x),
    "one after the other": lambda x, y, count: (y, y + 1),
    "the other way round": lambda x, y, count: (x * 2, x),
    "a tensor turned round": lambda x, y, count: (x.flip(1), x),
    "a tensor turned round, transposed in memory": lambda x, y, count: (
        x.reshape(-1, 2, 2).mT.flip(1).reshape(-1, 4),
        x,
    ),
    "what is not changed": lambda x, y, count: (x.clone(), x + y.clone()),
    "a branch that exchanges": in_branch(lambda x, y: (y, x)),
    "a branch that computes in place": in_branch(lambda x, y: (-x, y)),
    "a branch that reads neighbours": in_branch(lambda x, y: (x - x.flip(1), y)),
    "a branch that transposes": in_branch(transposed),
    "a branch that reads a sum": in_branch(lambda x, y: (x - x.sum(dim=1, keepdim=True), y + x)),
    "a branch that multiplies": in_branch(lambda x, y: (((x[:, :, None] * y[:, None]) @ x[:, :, None])[..., 0], y)),
    "a value from before a branch": computed_before,
    "an old value used later": old_value_used,
    "a value used after a branch": used_after_a_branch,
    "a product with a matrix": times_a_matrix,
    "a loop that asks for what it assigns": asked_and_assigned,
    "a branch in a branch": nested,
    "a loop that exchanges": halved,
}


def ran(step, x, y, width):
    """The steps of each lane, by the compiled machine."""
    carried = [x, y, torch.zeros(len(x), dtype=torch.int64), LIMITS, torch.zeros(len(x), dtype=torch.int64)]

    def once(recorder, carried, operands):
        x, y, count, limit, _ = carried
        with recorded_by(recorder), recorder:
            new = count + 1
            return [*step(x, y, count), new, limit, torch.where(new >= limit, 1, 0)], torch.zeros_like(
                new, dtype=torch.bool
            )

    recorded = record_step(Parts(once), [t[:1] for t in carried], [], [], [], 4, width)
    carried = [t.clone() for t in carried]
    recorded.run(carried, [], len(x), 100)
    return carried[:2]


def by_torch(step, x, y):
    ends = []
    for lane in range(len(x)):
        a, b = x[lane : lane + 1], y[lane : lane + 1]
        for count in range(LIMITS[lane]):
            a, b = step(a, b, torch.tensor([count]))
        ends.append((a, b))
    return [torch.cat(parts) for parts in zip(*ends, strict=True)]


def numbers(dtype=F64):
    return torch.randn(2, len(LIMITS), 4, generator=torch.Generator().manual_seed(0), dtype=F64).to(dtype)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("width", [1, 8])
@pytest.mark.parametrize("name", STEPS)
def test_a_recorded_step_assigns_as_torch_does(name, width, dtype):
    x, y = numbers(dtype)
    for found, expected in zip(ran(STEPS[name], x, y, width), by_torch(STEPS[name], x, y), strict=True):
        torch.testing.assert_close(
            found, expected, rtol=1e-12 if dtype == F64 else 1e-4, atol=1e-12 if dtype == F64 else 1e-5
        )


def finite_at_the_mirrored_place(x):
    x = x[:, :3]
    return torch.where((x == x).mT * (x.abs() != torch.inf).mT, x, 0.0)


SIMPLER = {
    "a sum with a negative": (lambda x: x[0] + (-x[1]), ["NEG", "SUB"]),
    "a choice between equals": (lambda x: torch.where(x[0] > x[1], x[2], x[2]), ["GT", "COPY"]),
    "a cube": (lambda x: x**3, ["MUL", "MUL"]),
    "finite numbers": (lambda x: torch.where(x.isfinite(), x, 0.0), ["ABS", "NE", "EQ", "ISFINITE", "WHERE"]),
    "flags that are transposed": (finite_at_the_mirrored_place, ["EQ", "ABS", "NE", "MUL", "WHERE"]),
}


@pytest.mark.parametrize("name", SIMPLER)
def test_shorter_instructions_give_the_same_bits(name):
    function, names = SIMPLER[name]
    special = torch.tensor([0.0, -0.0, torch.inf, 1.5, 1e200, -torch.inf], dtype=F64)
    x = torch.stack([special, special.roll(1), special.flip(0)])
    expected = function(x)[None].contiguous()
    (found,), recorded = recorded_once(lambda x: [function(x[0])[None]], x[None], [expected], 1)
    assert recorded == names
    assert torch.equal(found.view(torch.int64), expected.view(torch.int64))
