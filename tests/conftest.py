"""Fixtures of several files, and which cases are collected."""

from __future__ import annotations

import dataclasses
import gc
import re
from collections import Counter
from types import SimpleNamespace

import pytest
from checks.compiled import needs_cpu
from checks.ranks import Worlds
from torch import distributed

import implicitdiff as idf
from implicitdiff import _C
from implicitdiff.solvers._loop.compiled import Compiler
from implicitdiff.solvers._loop.options import Options


@pytest.fixture
def calls(monkeypatch):
    """Counts calls of the compiled functions by name."""
    counts = Counter()

    def counted(module, name):
        def run(*operands):
            counts[name] += 1
            return getattr(module, name)(*operands)

        return run

    for device in "cpu", "cuda":
        module = getattr(_C, device)
        if module is not None:
            monkeypatch.setattr(
                _C,
                device,
                SimpleNamespace(**{**vars(module), "step": counted(module, "step"), "pull": counted(module, "pull")}),
            )
    return counts


@pytest.fixture(params=[pytest.param(True, marks=needs_cpu), False], ids=["kernel", "plain"])
def pair(request):
    """AdamW, by kernels and by plain torch."""
    return idf.adamw(lr=0.1, use_accelerated_op=request.param)


@pytest.fixture(scope="session")
def on_ranks():
    """``on_ranks(size, fn, *args)``: what a function returns on each rank of a process group."""
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("torch is built without the gloo backend")
    worlds = Worlds()
    yield worlds
    worlds.close()


def pytest_addoption(parser):
    parser.addoption(
        "--compile",
        choices=("auto", "off", "always"),
        default="auto",
        help="the default of the option of solvers; always: a loop that is eager fails the test, but for REFUSED",
    )


# Why a loop may be eager: what no recording sees. What the machine has no instruction for is replayed.
REFUSED = re.compile(
    "reads the value|unknown origin|another mode|there is no lane|sparse|operand is a|calls |a large NumPy array|"
    "autograd.Function|by iterations"
)


@pytest.fixture(autouse=True)
def loops_of_solvers(request, monkeypatch):
    """Run every search as ``--compile`` says."""
    mode = request.config.getoption("--compile")
    if mode == "off":
        names = [field.name for field in dataclasses.fields(Options)]
        defaults = list(Options.__init__.__defaults__)
        defaults[names.index("compile")] = "off"
        monkeypatch.setattr(Options.__init__, "__defaults__", tuple(defaults))
    if mode != "always":
        yield
        return
    reasons, end = [], Compiler._end

    def noted(self, error):
        reasons.append(str(error).rpartition("nor replayed by torch: ")[2])
        return end(self, error)

    monkeypatch.setattr(Compiler, "_end", noted)
    yield
    assert not [reason for reason in reasons if not REFUSED.search(reason)]


def pytest_configure(config):
    # Here and not in pyproject.toml, so that a copy of this folder knows them.
    config.pluginmanager.register(Nightly())
    config.addinivalue_line("markers", "nightly: a case beyond those that each change runs")
    config.addinivalue_line(
        "markers", "one_in(n): on each change one case in n, and one with each value of each parameter"
    )


class Nightly:
    """Mark cases of ``one_in``, before pytest selects by marks."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items):
        counts, seen = Counter(), set()
        for item in items:
            if (mark := item.get_closest_marker("one_in")) is not None:
                function = item.nodeid.partition("[")[0]
                values = {(function, name, str(value)) for name, value in item.callspec.params.items()}
                if counts[function] % mark.args[0] and values <= seen:
                    item.add_marker("nightly")
                else:
                    seen |= values
                counts[function] += 1


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Of the cases of one function that are skipped for one reason, keep the first: one skip says it for all."""
    told, kept, left_out = set(), [], []
    for item in items:
        reasons = [mark.kwargs["reason"] for mark in item.iter_markers("skipif") if mark.args[0]]
        case = (item.nodeid.partition("[")[0], *reasons)
        (left_out if reasons and case in told else kept).append(item)
        told.add(case)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish():
    """Take what was collected out of the view of the garbage collector, whose runs took a second each."""
    gc.collect()
    gc.freeze()
