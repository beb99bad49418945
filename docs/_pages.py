"""Checks of the built pages: nothing loads from another host, and a search for the field's words finds them."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.search.en import SearchEnglish
from sphinx.util import logging

# Words of the field that a page answers to, though its text may use others.
KEYWORDS = {
    "implicit": "hypergradient bilevel argmin differentiation implicit layer differentiable optimization equilibrium",
    "explicit": "meta-learning meta-gradient MAML unrolled differentiation truncated backpropagation bilevel",
    "solvers": "differentiable optimization argmin differentiation implicit layer equilibrium model bilevel",
    "objects": "meta-learning meta-gradient MAML differentiable optimizer bilevel",
    "quickstart": "hypergradient bilevel hyperparameter tuning",
    "migrating": "TorchOpt JAXopt Optimistix torchdeq higher betty",
    "distributed": "data-parallel distributed DDP FSDP NCCL gloo torchrun multi-GPU",
    "linear_solvers": "hypergradient conjugate gradient Neumann series",
    "api/nn": "meta-learning meta-gradient implicit layer equilibrium model",
    "api/solvers": "differentiable optimization argmin differentiation implicit layer",
    "api/implicitdiff": "hypergradient argmin differentiation implicit layer meta-gradient",
}
# Searches, and a page that each has to find.
SEARCHES = {
    "hypergradient": "implicit",
    "bilevel": "implicit",
    "bilevel optimization": "index",
    "meta-learning": "explicit",
    "argmin differentiation": "implicit",
    "implicit layer": "implicit",
    "meta-gradient": "explicit",
    "equilibrium model": "solvers",
    "differentiable optimization": "solvers",
    "MAML": "explicit",
    "QP layer": "index",
    "data-parallel": "distributed",
}
# Elements that make a browser load, and the attributes with the address. A link to another site is no load.
LOADS = {
    "script": ("src",),
    "link": ("href",),
    "img": ("src", "srcset"),
    "source": ("src", "srcset"),
    "iframe": ("src",),
    "object": ("data",),
    "embed": ("src",),
    "audio": ("src",),
    "video": ("src", "poster"),
    "image": ("href", "xlink:href"),
    "use": ("href", "xlink:href"),
}
RELATIONS = {"canonical", "next", "prev", "index", "search", "author", "license", "alternate"}  # nothing is loaded
ELSEWHERE = re.compile(r"(?:https?:)?//", re.IGNORECASE)
IN_STYLES = re.compile(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//[^'\")\s]+", re.IGNORECASE)


def setup(app: Sphinx) -> None:
    """Connect what is below to the build."""
    app.connect("doctree-read", add_keywords)
    app.connect("build-finished", check_pages)


def add_keywords(app: Sphinx, doctree: nodes.document) -> None:
    """Add the words to the page's head and to the search index, one by one: the index stems single words."""
    words = re.findall(r"\w+", KEYWORDS.get(app.env.docname, ""))
    if words:
        doctree.insert(0, nodes.meta(name="keywords", content=", ".join(words)))


def check_pages(app: Sphinx, exception: Exception | None) -> None:
    """Warn of pages that load from elsewhere and of searches that fail."""
    if exception is not None or app.builder.name not in ("html", "dirhtml"):
        return
    place, logger = Path(app.outdir), logging.getLogger(__name__)
    for path in sorted([*place.rglob("*.html"), *place.rglob("*.css"), *place.rglob("*.svg")]):
        for address in loads_of(path):
            logger.warning("%s loads %s, from another host", path.relative_to(place), address)
    index = read_index(place / "searchindex.js")
    for query, page in SEARCHES.items():
        if page not in find_pages(index, query):
            logger.warning("a search for %r does not find the page %s", query, page)


class Loads(HTMLParser):
    """A parser that collects the addresses from which a page loads.

    Attributes:
        found: the addresses on other hosts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect the addresses of a tag."""
        values = dict(attrs)
        if tag == "link" and set((values.get("rel") or "").split()) <= RELATIONS:
            return
        self.found += [value for name in LOADS.get(tag, ()) if ELSEWHERE.match(value := values.get(name) or "")]


def loads_of(path: Path) -> list[str]:
    """Return the addresses on other hosts from which a page, a style sheet or a picture loads."""
    text = path.read_text(encoding="utf-8", errors="replace")
    parser = Loads()
    if path.suffix != ".css":
        parser.feed(text)
    return parser.found + IN_STYLES.findall(text)


def read_index(path: Path) -> dict[str, dict[str, int | list[int]]]:
    """Return Sphinx's search index."""
    return json.loads(re.fullmatch(r"Search\.setIndex\((.*)\);?\s*", path.read_text(encoding="utf-8"), re.DOTALL)[1])


def find_pages(index: dict[str, dict[str, int | list[int]]], query: str) -> set[str]:
    """Return the pages with every word of the query, in their text or their titles, as the search page does."""
    stem = SearchEnglish({}).stem
    results = [pages_with(index, stem(word.lower())) for word in re.findall(r"\w+", query)]
    return {index["docnames"][page] for page in set.intersection(*results)}


def pages_with(index: dict[str, dict[str, int | list[int]]], word: str) -> set[int]:
    """Return the numbers of the pages with a stem; the index has a number in the place of a list of one."""
    found = [index[part].get(word, []) for part in ("terms", "titleterms")]
    return {page for pages in found for page in (pages if isinstance(pages, list) else [pages])}
