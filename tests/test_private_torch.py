"""The behaviour of torch on which the package depends: a canary, an assertion, for each private name that it uses.

When a new torch breaks the package, this file says first which name moved, and which functions use it.
"""

from __future__ import annotations

import re
from collections import namedtuple

import pytest
import torch
from torch.func import grad

# Before these are imported.
pytest.register_assert_rewrite("checks.private_names", "tables.canaries_of_levels", "tables.canaries_of_objects")

from checks.private_names import CANARIES, find, operations, private_names, verdict  # noqa: E402
from tables.canaries_of_levels import LEVELS, plain  # noqa: E402
from tables.canaries_of_objects import LEAVES, TREE, TREES, Pair  # noqa: E402


def test_every_private_name_has_a_canary() -> None:
    missing = {name: sorted(users) for name, users in private_names().items() if name not in CANARIES}
    assert missing == {}, "private names of torch without an assertion here"


def test_every_canary_is_of_a_name_in_use() -> None:
    assert sorted(CANARIES.keys() - private_names().keys()) == []


def test_paths_of_private_names_are_in_one_folder() -> None:
    outside = {
        name: users
        for name, where in private_names().items()
        if name.startswith("torch.") and (users := sorted(user for user in where if not user.startswith("_torch/")))
    }
    assert not outside, "implicitdiff/_torch/ is the place of private names"


def test_the_names_are_found() -> None:
    users = private_names()
    assert "_torch/levels.py: rewrap" in users["torch._C._functorch._wrap_for_grad"]
    assert "_torch/trees.py: names_of" in users["torch.utils._pytree.keystr"]
    assert len(users) > 50


def test_specs_of_trees_say_how_they_are_nested() -> None:
    structure, spec_type = find(TREES + "tree_structure"), find(TREES + "TreeSpec")
    spec = structure(TREE)
    assert (spec.type, list(spec.context), spec.num_leaves, spec.num_nodes) == (dict, ["b", "a"], 5, 10)
    first, second = spec.children()
    assert (first.type, second.type, second.context) == (list, namedtuple, Pair)
    # Dictionaries are matched by key.
    assert spec.flatten_up_to({"a": TREE["a"], "b": TREE["b"]}) == LEAVES
    with pytest.raises(ValueError, match=r"."):
        spec.flatten_up_to({"a": 1})
    leaf = find(TREES + "treespec_leaf")
    assert spec_type(dict, ["b", "a"], [leaf(), leaf()]).flatten_up_to(TREE) == [TREE["b"], TREE["a"]]


def test_torch_func_differentiates_in_inference_mode() -> None:
    with torch.inference_mode():
        torch.testing.assert_close(grad(lambda x: x.exp().sum())(plain()), plain().exp())


# What torch has no longer, with the version that dropped it.
DROPPED = {"cholesky": "2.14"}


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2])


@pytest.mark.parametrize("name", sorted(operations()))
def test_operations_that_are_replaced_are_there(name: str) -> None:
    is_there = hasattr(torch.ops.aten, name)
    is_dropped = name in DROPPED and version(torch.__version__) >= version(DROPPED[name])
    assert is_there != is_dropped, f"torch {torch.__version__}: {name}, which _torch/replacements/ replaces"


@pytest.mark.parametrize("name", CANARIES)
def test_torch_does_what_is_taken_for_granted(name: str) -> None:
    if reason := verdict(name):
        pytest.fail(reason, pytrace=False)


def test_the_verdict_names_torch_and_the_functions_at_stake(monkeypatch: pytest.MonkeyPatch) -> None:
    name = LEVELS + "maybe_get_level"
    monkeypatch.setattr(torch._C._functorch, "maybe_get_level", lambda tensor: 0)
    assert re.search(
        rf"torch {re.escape(torch.__version__)}: {name}: .*_torch/levels.py: are_plain", verdict(name), re.S
    )
    monkeypatch.delattr(torch._C._functorch, "maybe_get_level")
    assert re.search(r"AttributeError.*_torch/levels.py: are_plain", verdict(name), re.S)
