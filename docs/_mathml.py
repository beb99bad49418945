"""Equations as MathML in the page, which browsers draw by themselves: no script, no font, no network."""

from __future__ import annotations

import re

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number
from sphinx.writers.html5 import HTML5Translator


def setup(app: Sphinx) -> None:
    """Register the renderer."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    app.connect("doctree-read", keep_punctuation)


def keep_punctuation(app: Sphinx, doctree: nodes.document) -> None:
    """Keep a comma on the line of the equation before it: browsers may break the line between the two."""
    for math in list(doctree.findall(nodes.math)):
        text = math.next_node(nodes.Text, descend=False, siblings=True)
        sign = text.astext()[:1] if text else ""
        if sign and sign in ",.;:)" and math.parent.index(text) == math.parent.index(math) + 1:
            text.parent.replace(text, nodes.Text(text.astext()[1:]))
            together = nodes.inline(classes=["together"])
            math.replace_self(together)
            together += [math, nodes.Text(sign)]


def visit_inline(self: HTML5Translator, node: nodes.math) -> None:
    """Write an equation that stands in a sentence."""
    self.body.append(convert(node, block=False))
    raise nodes.SkipNode


def visit_block(self: HTML5Translator, node: nodes.math_block) -> None:
    """Write an equation that stands by itself, in a box that scrolls."""
    self.body.append(self.starttag(node, "div", CLASS="math"))
    self.body.append(convert(node, block=True))
    if node["number"]:
        self.body.append(f'<span class="eqno">({get_node_equation_number(self, node)})</span>')
    self.body.append("</div>\n")
    raise nodes.SkipNode


def convert(node: nodes.Element, *, block: bool) -> str:
    """Return the MathML of an equation, or warn and return its TeX."""
    tex = node.astext()
    try:
        mathml = tex2mathml(tex, as_block=block)
    except MathError as error:
        logging.getLogger(__name__).warning("equation %r: %s", tex, error, location=node)
        return nodes.literal(tex, tex).astext()
    # Without line breaks, so that no space stands between an equation and the comma behind it.
    return re.sub(r"\n\s*", "", mathml)
