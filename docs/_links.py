"""References: public names by any of their spellings, names of other libraries, and code spans of the pages."""

from __future__ import annotations

import importlib
import pydoc
import re
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import inspect, logging
from sphinx.util.nodes import make_refnode

# The addresses of the inventories in docs/_inventories.
ADDRESSES = {
    "torch": "https://docs.pytorch.org/docs/stable/",
    "numpy": "https://numpy.org/doc/stable/",
    "scipy": "https://docs.scipy.org/doc/scipy/",
    "python": "https://docs.python.org/3/",
}
# Spellings that differ from the documented one: of annotations, which name the module of a definition, and of prose.
SPELLINGS = {
    "nn.Module": "torch.nn.Module",
    "Tensor.backward": "torch.Tensor.backward",
    "torch.autograd.gradcheck": "torch.autograd.gradcheck.gradcheck",
    "torch.nn.Parameter": "torch.nn.parameter.Parameter",
    "torch.nn.modules.module.Module": "torch.nn.Module",
    "torch.optim.optimizer.Optimizer": "torch.optim.Optimizer",
    "torch.utils.data.dataloader.DataLoader": "torch.utils.data.DataLoader",
    "typing_extensions.Unpack": "typing.Unpack",
}
# A bare name is looked up in these modules, in this order. In the others a bare name may be a word: `scale`, `trace`.
BARE = ("implicitdiff", "implicitdiff.solvers", "implicitdiff.linear_solve")
OTHERS = (
    "implicitdiff.optim",
    "implicitdiff.prox",
    "implicitdiff.projections",
    "implicitdiff.schedule",
    "implicitdiff.nn",
    "implicitdiff.objects",
    "implicitdiff.pytree",
)

_names: dict[int, str] = {}  # the name on a page of an object, by its identity


def setup(app: Sphinx) -> None:
    """Connect what is below to the build."""
    # Sphinx prints the name of an alias inside of a union as `TypeAliasForwardRef('Name')`.
    inspect.TypeAliasForwardRef.__repr__ = lambda self: self.name
    app.connect("builder-inited", check_inventories)
    app.connect("doctree-read", link_code)
    app.connect("missing-reference", respell, priority=100)
    app.connect("missing-reference", find_public, priority=600)


def check_inventories(app: Sphinx) -> None:
    """Warn of names in the inventories that Python does not find."""
    for path in sorted(Path(__file__).parent.glob("_inventories/*.inv")):
        for line in path.read_text().splitlines()[3:]:
            name = line.split()[0]
            module, _, rest = name.rpartition(".")
            # pydoc.locate finds the function torch.autograd.gradcheck in the place of its module.
            if pydoc.locate(name) is None and not hasattr(importlib.import_module(module), rest):
                logging.getLogger(__name__).warning("%s: there is no %s", path.name, name)


def link_code(app: Sphinx, doctree: nodes.document) -> None:
    """Turn code of a page that is a public name, here or in an inventory, into a link; other code stays as it is."""
    for literal in list(doctree.findall(nodes.literal)):
        target = literal.astext().removesuffix("()")
        if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", target) or not may_link(literal, app.env.docname):
            continue
        if "." in target or is_public(target):
            options = {"refdomain": "py", "reftype": "obj", "reftarget": target, "refdoc": app.env.docname}
            link = addnodes.pending_xref("", refexplicit=False, refwarn=False, optional=True, **options)
            literal.replace_self(link)
            link += literal


def may_link(literal: nodes.literal, page: str) -> bool:
    """Return True if code may become a link: not in a title or link, and no name of another library's table."""
    if isinstance(literal.parent, (nodes.title, nodes.reference, addnodes.pending_xref)):
        return False
    cell = literal.parent
    while cell is not None and not isinstance(cell, nodes.entry):
        cell = cell.parent
    return page != "migrating" or cell is None or cell.parent.index(cell) > 0


def is_public(name: str) -> bool:
    """Return True if a bare name is looked up, and is no module."""
    modules = map(importlib.import_module, BARE)
    return any(name in module.__all__ for module in modules) and pydoc.locate(f"implicitdiff.{name}.__path__") is None


def respell(app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, content: nodes.TextElement) -> None:
    """Give the reference the documented spelling, for the inventories."""
    if node.get("refdomain") == "py":
        node["reftarget"] = SPELLINGS.get(node["reftarget"], node["reftarget"])


def find_public(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, content: nodes.TextElement
) -> nodes.Element | None:
    """Find a public name by any of its spellings, for example `adam` and `implicitdiff.adam` for the one in `optim`."""
    if node.get("refdomain") != "py":
        return None
    target, page = node["reftarget"].removeprefix("implicitdiff."), node["refdoc"]
    exact = target != node["reftarget"] or "." in target or target[:1].isupper() or page.startswith("gallery/")
    name = documented_name(env, target, BARE + OTHERS if exact else BARE)
    if name is None:
        return content if node.get("optional") else None
    found = env.domains.python_domain.objects[name]
    return make_refnode(app.builder, page, found.docname, found.node_id, content)


def documented_name(env: BuildEnvironment, target: str, modules: tuple[str, ...]) -> str | None:
    """Return the name on a page of the object that has this name in the first of the modules that has one."""
    objects = env.domains.python_domain.objects
    if not _names:
        _names.update((id(pydoc.locate(name)), name) for name in objects)
    for name in (f"implicitdiff.{target}", *(f"{module}.{target}" for module in modules)):
        found = name if name in objects else _names.get(id(pydoc.locate(name)))
        if found and pydoc.locate(name) is not None:
            return found
    return None
