"""Programs of the compiled machine: loops, blocks of lanes, and what it refuses."""

from __future__ import annotations

import itertools

import pytest
import torch
from checks.compiled import needs_cpu
from tables.machine import F64, I64, NUMBER, addresses, instruction, sections

from implicitdiff._C import cpu

pytestmark = needs_cpu
each_width = pytest.mark.parametrize("width", [1, 8])
each_threads = pytest.mark.parametrize("threads", [1, 2])
LANES = 21


def scalar(name, *offsets):
    """An instruction on elements of the arena."""
    return instruction(name, (), *((0, offset, ()) for offset in offsets))


def jump(target):
    return [NUMBER["JUMP"], target]


def jump_unless_any(target, offset, count=1):
    return [NUMBER["JUMP_UNLESS_ANY"], target, offset, count]


# Where the scalars of the programs below lie.
RUNNING, PAUSED, COUNT, LIMIT, ONE, TWO, VALUE, PAUSE_AT = range(8)


def counting(width, extra=(), entry=()):
    """Count to each lane's limit, and double a value each time; paused where the count is that of the pause."""
    start = [scalar("LT", RUNNING, COUNT, LIMIT)]
    # A lane that has ended keeps its numbers.
    step = [
        scalar("ADD", VALUE + 4, COUNT, ONE),
        scalar("MUL", VALUE + 5, VALUE, TWO),
        scalar("COMMIT", COUNT, VALUE + 4, RUNNING),
        scalar("COMMIT", VALUE, VALUE + 5, RUNNING),
        scalar("EQ", PAUSED, COUNT, PAUSE_AT),
        *extra,
        *start,
    ]
    carries = [(COUNT, 1, 2), (VALUE, 1, 0), (PAUSED, 1, 3)]
    inputs = [(LIMIT, 1, 4), (ONE, 1, 0), (TWO, 1, 1), (PAUSE_AT, 1, 2)]
    code = [*entry, *start, *step]
    return cpu.Machine(
        width, code, sections(code, len(entry), len(entry) + 1), 16, carries, inputs, [], RUNNING, PAUSED
    )


class Lanes:
    """The tensors of `counting`."""

    def __init__(self, limits, pause_at=None):
        n = len(limits)
        self.carries = torch.zeros(n, dtype=I64), torch.ones(n, dtype=F64), torch.zeros(n, dtype=torch.bool)
        self.count, self.value, self.paused = self.carries
        pauses = torch.full((n,), -1) if pause_at is None else torch.tensor(pause_at)
        self.inputs = torch.tensor(limits, dtype=torch.int32), torch.ones(n, dtype=F64), torch.full((n,), 2.0), pauses

    def run(self, machine, at_most=1000, threads=1):
        return machine.run(addresses(*self.carries), addresses(*self.inputs), [], len(self.count), at_most, threads)


def steps_of_blocks(limits, width):
    return sum(max(limits[i : i + width]) for i in range(0, len(limits), width))


@each_threads
@each_width
def test_each_block_runs_to_its_own_end(width, threads):
    limits = [(7 * lane) % 12 for lane in range(LANES)]
    lanes = Lanes(limits)
    assert lanes.run(counting(width), threads=threads) == steps_of_blocks(limits, width)
    assert lanes.count.tolist() == limits
    assert lanes.value.tolist() == [2.0**limit for limit in limits]


@each_width
def test_a_run_that_has_ended_does_nothing(width):
    lanes = Lanes([0] * LANES)
    assert lanes.run(counting(width)) == 0
    assert not lanes.count.any()
    assert Lanes([]).run(counting(width)) == 0


@each_threads
@each_width
def test_a_run_may_be_cut_and_continued(width, threads):
    limits = [3 + lane for lane in range(LANES)]
    lanes, machine = Lanes(limits), counting(width)
    blocks = -(-LANES // width)
    assert lanes.run(machine, 2, threads) == 2 * blocks
    assert lanes.count.tolist() == [2] * LANES
    assert lanes.run(machine, 10**6, threads) == steps_of_blocks(limits, width) - 2 * blocks
    assert lanes.count.tolist() == limits


@each_threads
@each_width
def test_a_block_stops_where_a_lane_pauses(width, threads):
    pause_at = [-1] * LANES
    pause_at[10] = 4
    lanes = Lanes([9] * LANES, pause_at)
    lanes.run(counting(width), threads=threads)
    stopped = range(8, 16) if width == 8 else range(10, 11)
    assert lanes.count.tolist() == [4 if lane in stopped else 9 for lane in range(LANES)]
    assert lanes.paused.nonzero().flatten().tolist() == [10]


@each_width
def test_jumps_skip_and_repeat(width):
    # value = 2 ** count by an inner loop that counts down, left where no lane is above 0.
    rest, one, positive, value = 2, 3, 4, 5
    code = [
        scalar("GT", positive, rest, one),
        jump_unless_any(6, positive),
        scalar("ADD", 6, value, value),
        scalar("COMMIT", value, 6, positive),
        scalar("SUB", rest, rest, one),
        jump(0),
        scalar("SUB", 0, one, one),
        jump(9),
        scalar("ADD", value, value, value),
    ]
    machine = cpu.Machine(
        width, code, sections(code), 8, [(0, 1, 0), (rest, 1, 2), (value, 1, 0)], [(one, 1, 0)], [], 0, 1
    )
    counts = torch.arange(LANES) % 13
    rest, running, value, one = counts.clone(), *torch.ones(3, LANES, dtype=F64)
    tensors = addresses(running, rest, value), addresses(one), []
    assert machine.run(*tensors, LANES, 5, 1) == -(-LANES // width)
    assert value.tolist() == [2.0 ** max(count - 1, 0) for count in counts.tolist()]


@each_width
@pytest.mark.parametrize("at", [None, 0, 4])
def test_a_jump_reads_all_of_its_elements_in_all_lanes(at, width):
    flags, kept, one = 2, 7, 8
    code = [
        jump_unless_any(2, flags, 5),
        scalar("COPY", kept, one),
        jump_unless_any(4, flags, 0),
        scalar("COPY", 0, 1),
        scalar("COPY", 0, 1),
    ]
    machine = cpu.Machine(
        width, code, sections(code), 9, [(0, 1, 0), (kept, 1, 3)], [(flags, 5, 0), (one, 1, 0)], [], 0, 1
    )
    values, running, reached = torch.zeros(3, 5, dtype=F64), torch.ones(3, dtype=F64), torch.zeros(3, dtype=torch.bool)
    ones = running.clone()
    if at is not None:
        values[1, at] = -0.5
    machine.run(addresses(running, reached), addresses(values, ones), [], 3, 1, 1)
    assert reached.tolist() == [at is not None and (width == 8 or lane == 1) for lane in range(3)]


@each_threads
@each_width
def test_sections_run_for_each_thread_and_for_each_block(width, threads):
    # The first section computes a constant of the shared array; the second one counts the blocks that a thread has run.
    constant, blocks, per_block, out = 2, 3, 4, 5
    code = [
        instruction("COPY", (), (0, constant, ()), (1, 1, ())),
        scalar("ADD", blocks, blocks, constant),
        scalar("COPY", per_block, out),
        scalar("ADD", out, per_block, constant),
        scalar("SUB", 0, constant, constant),
    ]
    machine = cpu.Machine(width, code, sections(code, 1, 3), 6, [(0, 1, 0), (out, 1, 0), (out, 0, 0)], [], [2], 0, 1)
    running, value, nothing = torch.ones(LANES, dtype=F64), torch.arange(LANES, dtype=F64), torch.zeros(0)
    shared = torch.tensor([5.0, 0.25], dtype=F64)
    machine.run(addresses(running, value, nothing), [], addresses(shared), LANES, 3, threads)
    assert value.tolist() == [lane + 0.25 for lane in range(LANES)]


def judged(width):
    """Count from a start to a limit, which each judgement raises by one until it is the last limit."""
    running, paused, count, limit, first, last, one, asked, new = range(9)
    start = [scalar("COPY", count, first)]
    head = [scalar("LT", running, count, limit)]
    step = [scalar("ADD", new, count, one), scalar("COMMIT", count, new, running), *head]
    judge = [scalar("LT", asked, limit, last), scalar("ADD", new, limit, one), scalar("COMMIT", limit, new, asked)]
    code = [*start, *head, *step, *judge]
    begins = [0, 0, 1, 2, 2 + len(step)]
    carries, inputs = [(count, 1, 0), (limit, 1, 0)], [(first, 1, 0), (last, 1, 0), (one, 1, 0)]
    return cpu.Machine(width, code, begins, 9, carries, inputs, [], running, paused)


def judged_lanes(machine, at_most, threads, **parts):
    """The counts and the limits, from a count of 1 and a limit of 4."""
    count, limit = torch.ones(LANES, dtype=F64), torch.full((LANES,), 4.0, dtype=F64)
    first = torch.arange(LANES, dtype=F64) % 4
    inputs = addresses(first, last := 3 + torch.arange(LANES, dtype=F64) % 5, one := torch.ones(LANES, dtype=F64))
    machine.run(addresses(count, limit), inputs, [], LANES, at_most, threads, **parts)
    return count, limit, first, last, one


@each_threads
@each_width
def test_a_search_starts_and_is_judged_where_it_is_asked_for(width, threads):
    machine = judged(width)
    for starts, judges in itertools.product([False, True], repeat=2):
        count, limit, first, last, _ = judged_lanes(machine, 100, threads, starts=starts, judges=judges)
        assert torch.equal(limit, torch.maximum(last, torch.tensor(4.0)) if judges else torch.full_like(last, 4.0))
        assert torch.equal(count, limit)
        count, limit, first, *_ = judged_lanes(machine, 0, threads, starts=starts, judges=judges)
        assert torch.equal(count, first if starts else torch.ones_like(first))
        assert torch.equal(limit, torch.full_like(last, 4.0))


@each_width
def test_a_judgement_alone_makes_no_step(width):
    machine = judged(width)
    count, limit, first, last, one = judged_lanes(machine, 100, 1)
    machine.run(addresses(count, limit), addresses(first, last, one), [], LANES, 0, 1, judges=True)
    assert torch.equal(count, torch.full_like(last, 4.0))
    assert torch.equal(limit, 4.0 + (last > 4.0))


def test_inputs_are_only_read_and_copied_lanes_are_not_written():
    lanes = Lanes([5] * 3)
    memory = torch.full((8,), 9, dtype=I64)
    memory[:3] = 0
    lanes.carries = memory[:3], *lanes.carries[1:]
    before = [x.clone() for x in lanes.inputs]
    lanes.run(counting(8))
    assert memory.tolist() == [5, 5, 5, 9, 9, 9, 9, 9]
    assert all(torch.equal(x, y) for x, y in zip(before, lanes.inputs, strict=True))


@each_width
def test_results_of_no_elements_are_not_written(width):
    code = [
        instruction("ADD", (3, 0), (0, 2, (1, 1)), (0, 2, (1, 1)), (0, 3, (1, 1))),
        instruction("SUM", (0, 3), (0, 2, (1, 0)), (0, 2, (3, 1))),
        instruction("MATMUL", (2, 0, 3), (0, 2, (0, 1, 0)), (0, 2, (3, 0, 1)), (0, 2, (0, 1, 0)), rounded=True),
        scalar("COPY", 0, 1),
    ]
    machine = cpu.Machine(width, code, sections(code), 8, [(0, 1, 0), (2, 6, 0)], [], [], 0, 1)
    running, values = torch.ones(1, dtype=F64), torch.arange(6, dtype=F64)
    assert machine.run(addresses(running, values), [], [], 1, 5, 1) == 1
    assert torch.equal(values, torch.arange(6, dtype=F64))


# Refusals

ADD = scalar("ADD", 0, 1, 2)
PROGRAM = {
    "width": 8,
    "code": [ADD],
    "sections": [0, 0, 0, 0, 1],
    "arena": 10,
    "carries": [(0, 1, 0)],
    "inputs": [],
    "shared": [3],
    "running": 0,
    "paused": 1,
}
A, B, C = (0, 0, (1,)), (0, 3, (1,)), (0, 6, (1,))
BAD_CODE = {
    "it is empty": [],
    "there is no operation -1": [-1, *ADD[1:]],
    f"there is no operation {len(NUMBER)}": [len(NUMBER), *ADD[1:]],
    r"\(ADD\): the flag of rounding is 2": [ADD[0], 2, *ADD[2:]],
    r"\(ADD\): the number of dimensions is 7": [ADD[0], 0, 7, *ADD[3:]],
    r"\(ADD\): the number of dimensions is -1": [ADD[0], 0, -1, *ADD[3:]],
    r"\(ADD\): a size is -3": instruction("ADD", (-3,), A, B, C),
    r"\(ADD\): a size is 2199023255552": instruction("ADD", (2**41,), A, B, C),
    r"\(ADD\): its sizes are too large": instruction("ADD", (2**30, 2**30), *[(0, 0, (0, 0))] * 3),
    r"\(ADD\): the number of references is 2, not 3": instruction("ADD", (1,), A, B),
    r"\(ADD\): the number of references is 4, not 3": instruction("ADD", (1,), A, B, C, C),
    r"\(ADD\): it ends before a stride": instruction("ADD", (1,), A, B, C)[:-1],
    r"\(ADD\): it ends before the number of dimensions": ADD[:2],
    r"\(ADD\): it has 1 numbers too many": [*ADD, 0],
    r"\(ADD\): a space is 2": instruction("ADD", (1,), A, B, (2, 0, (1,))),
    r"\(ADD\): a space is -1": instruction("ADD", (1,), A, B, (-1, 0, (1,))),
    r"\(ADD\): an offset is -1": instruction("ADD", (1,), A, B, (0, -1, (1,))),
    r"\(ADD\): a stride is 2199023255552": instruction("ADD", (1,), A, B, (0, 1, (2**41,))),
    r"\(ADD\): an output is a shared array": instruction("ADD", (1,), (1, 0, (1,)), A, B),
    r"\(NEG\): input 0 is a shared array, which": instruction("NEG", (1,), A, (1, 0, (1,))),
    r"\(WHERE\): input 1 is a shared array, which": instruction("WHERE", (1,), A, A, (1, 0, (1,)), A),
    r"\(SUM\): input 0 is a shared array, which": instruction("SUM", (1,), A, (1, 0, (1,))),
    r"\(ADD\): an output reaches out of the arena": instruction("ADD", (3,), (0, 8, (1,)), A, B),
    r"\(ADD\): input 0 reaches out of the arena": instruction("ADD", (3,), A, (0, 1, (-1,)), B),
    r"\(ADD\): input 1 reaches out of the arena": instruction("ADD", (3,), A, B, (0, 0, (5,))),
    r"\(ADD\): input 1 reaches out of shared array 0": instruction("ADD", (3,), A, B, (1, 1, (1,))),
    r"\(COPY\): an output reaches out of the arena": instruction("COPY", (0,), (0, 11, (1,)), A),
    r"\(COMMIT\): an output reaches out of the arena": instruction("COMMIT", (3,), (0, 9, (1,)), A, B),
    r"\(SUM\): it has no dimension": instruction("SUM", (), (0, 0, ()), (0, 1, ())),
    r"\(SUM\): an output reaches out of the arena": instruction("SUM", (0,), (0, 10, (0,)), A),
    r"\(AMAX\): it reduces no elements": instruction("AMAX", (2, 0), (0, 0, (1, 0)), (0, 0, (1, 1))),
    r"\(ARGMIN\): it reduces no elements": instruction("ARGMIN", (0,), A, B),
    r"\(MATMUL\): it has no dimension": instruction("MATMUL", (), *[(0, 0, ())] * 3),
    r"\(MATMUL\): input 1 reaches out of the arena": instruction("MATMUL", (4,), (0, 0, (0,)), A, (0, 7, (1,))),
    r"\(LU\): it has 1 dimensions, not 2": instruction("LU", (1,), A, A, A, A),
    r"\(LU\): its matrix is not square": instruction("LU", (2, 1), *[(0, 0, (1, 1))] * 4),
    r"\(CHOLESKY\): its matrix is not square": instruction("CHOLESKY", (1, 2), *[(0, 0, (1, 1))] * 3),
    r"\(LU\): input 0 reaches out of the arena": instruction("LU", (2, 2), *[(0, 0, (2, 1))] * 3, (0, 7, (2, 1))),
    r"\(LU\): an output reaches out of the arena": instruction(
        "LU", (2, 2), (*A[:2], (2, 1)), (0, 9, (1, 0)), *[(0, 0, (2, 1))] * 2
    ),
    r"\(CHOLESKY\): an output reaches out": instruction(
        "CHOLESKY", (0, 0), (0, 0, (1, 1)), (0, 10, (0, 0)), (0, 0, (1, 1))
    ),
    r"\(LU_SOLVE\): input 1 reaches out of the arena": instruction(
        "LU_SOLVE", (2, 1), (0, 0, (1, 1)), (0, 0, (2, 1)), (0, 9, (1, 0)), (0, 0, (1, 1))
    ),
    r"\(SOLVE_LOWER\): input 0 reaches out": instruction(
        "SOLVE_LOWER", (3, 1), (0, 0, (1, 1)), (0, 2, (3, 1)), (0, 0, (1, 1))
    ),
    r"\(SOLVE_UPPER\): an output reaches out": instruction(
        "SOLVE_UPPER", (2, 2), (0, 7, (2, 1)), *[(0, 0, (2, 1))] * 2
    ),
    r"\(JUMP\): it has 3 numbers, not 2": [*jump(0), 0],
    r"\(JUMP_UNLESS_ANY\): it has 2 numbers, not 4": jump_unless_any(0, 0)[:2],
    r"\(JUMP\): it leaves its section, from 0 to 1, for 2": jump(2),
    r"\(JUMP\): it leaves its section, from 0 to 1, for -1": jump(-1),
    r"\(JUMP_UNLESS_ANY\): it reads out of the arena": jump_unless_any(0, 8, 3),
    r"\(JUMP_UNLESS_ANY\): it reads out of the arena$": jump_unless_any(0, 0, -1),
    r"\(JUMP_UNLESS_ANY\): it reads out of the aren": jump_unless_any(0, -1),
}
BAD_PROGRAMS = {
    "width is 4, not 1 or 8": {"width": 4},
    "an arena of -1 elements": {"arena": -1},
    "an arena of 2199023255552 elements": {"arena": 2**41},
    "a shared array of -1 elements": {"shared": [-1]},
    "sections begin at -1, 0, 0, 0, 1, of 1": {"sections": [-1, 0, 0, 0, 1]},
    "sections begin at 1, 0, 0, 0, 1, of 1": {"sections": [1, 0, 0, 0, 1]},
    "sections begin at 0, 0, 0, 2, 1, of 1": {"sections": [0, 0, 0, 2, 1]},
    "sections begin at 0, 0, 0, 0, 2, of 1": {"sections": [0, 0, 0, 0, 2]},
    "running is out of the arena": {"running": 10},
    "running is out of": {"running": -1},
    "paused is out of the arena": {"paused": 10},
    "carry 0 is out of the arena": {"carries": [(10, 1, 0)]},
    "carry 1 is out of the arena": {"carries": [(0, 1, 0), (-1, 1, 0)]},
    "input 0 is out of the arena": {"inputs": [(8, 3, 0)]},
    "input 0 is out of": {"inputs": [(8, -1, 0)]},
    "input 0 has no dtype 5": {"inputs": [(0, 1, 5)]},
    "carry 0 has no dtype -1": {"carries": [(0, 1, -1)]},
    "instruction 1 .JUMP.: it leaves its section, from 1 to 2, for 0": {
        "code": [ADD, jump(0), ADD],
        "sections": [1, 2, 2, 2, 3],
    },
    "instruction 0 .JUMP.: it leaves its section, from 0 to 1, for 2": {
        "code": [jump(2), ADD],
        "sections": [1, 1, 1, 1, 2],
    },
    "instruction 1 .JUMP.: it leaves its section, from 1 to 3, for 0": {
        "code": [ADD, jump(0), ADD, ADD],
        "sections": [0, 0, 0, 1, 3],
    },
    "instruction 2 .JUMP.: it leaves its section, from 2 to 3, for 0": {
        "code": [ADD, ADD, jump(0)],
        "sections": [0, 0, 0, 0, 2],
    },
}


@pytest.mark.parametrize("sentence", BAD_CODE)
def test_bad_instructions_are_refused(sentence):
    with pytest.raises(ValueError, match=f"instruction 0.*{sentence}" if "\\(" in sentence else sentence):
        cpu.Machine(**PROGRAM | {"code": [BAD_CODE[sentence]]})


@pytest.mark.parametrize("sentence", BAD_PROGRAMS)
def test_bad_programs_are_refused(sentence):
    with pytest.raises(ValueError, match=sentence):
        cpu.Machine(**PROGRAM | BAD_PROGRAMS[sentence])


@pytest.mark.parametrize("wrong", [{"code": [[1.5]]}, {"code": "ADD"}, {"carries": [(0, 1)]}, {"shared": None}])
def test_programs_of_other_types_are_refused(wrong):
    with pytest.raises(TypeError):
        cpu.Machine(**PROGRAM | wrong)


def test_bad_runs_are_refused():
    machine = cpu.Machine(**PROGRAM | {"inputs": [(1, 1, 0)]})
    right = {"carries": [0], "inputs": [0], "shared": [0], "lanes": 0, "at_most": 1, "threads": 1}
    bad = {
        "0 addresses of carries, not 1": {"carries": []},
        "2 addresses of inputs, not 1": {"inputs": [0, 0]},
        "0 addresses of shared arrays, not 1": {"shared": []},
        "lanes is -1": {"lanes": -1},
        "at_most is -1": {"at_most": -1},
        "a null address": {"lanes": 1},
    }
    assert machine.run(**right) == 0
    for sentence, wrong in bad.items():
        with pytest.raises(ValueError, match=sentence):
            machine.run(**right | wrong)
