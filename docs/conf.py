"""How the documentation is built: ``python3 -m nox -s docs``."""

from __future__ import annotations

import inspect
import pydoc
import re
import sys
from importlib import metadata
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer
from sphinx.util import logging

import implicitdiff

sys.path.insert(0, str(Path(__file__).parent))  # for the modules beside this one

import _links

project = "implicitdiff"
author = "The implicitdiff authors"
copyright = author
release = metadata.version(project)

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "_links",
    "_mathml",
    "_pages",
]
exclude_patterns = ["_build", "_static", "_templates", "_inventories", "gallery/*.ipynb", "gallery/*.py"]
templates_path = ["_templates"]
# A single backtick in a docstring: a link where it names something of this library, else code.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [
    # An argument or a local name in single backticks.
    ("py:obj", r"[a-z_]\w*"),
    # Type variables; docs/api/types says what X and P stand for.
    ("py:class", r"(~|.*\.)?(X|P|Aux)"),
]
intersphinx_mapping = {name: (address, f"_inventories/{name}.inv") for name, address in _links.ADDRESSES.items()}

html_math_renderer = "mathml"
html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_copy_source = False
html_show_sphinx = False
highlight_language = "none"  # what docstrings set apart without a prompt are equations
pygments_style = "friendly"
pygments_dark_style = "monokai"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"
autodoc_type_aliases = {name: name for name in ("Number", "Schedule", "Solve", "Tree")}
autodoc_type_aliases["Axis"] = "implicitdiff.distributed.Axis"
autodoc_member_order = "bysource"
# A line for each argument of a longer signature, so that a phone shows it.
python_maximum_signature_line_length = 72
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [
    ("Raises (when solving)", "Raises"),
    "Reference",
    # As a list in the text: a field of a NamedTuple is no object of its own to link to.
    ("Attributes", "params_style"),
    ("Common options", "params_style"),
]

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "copyfile_regex": r"index\.rst",  # groups the examples
    "backreferences_dir": "gallery/backreferences",  # without it each group is a warning
    "filename_pattern": "/",
    "reset_modules": ("matplotlib", "_between_examples.reset"),
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "show_signature": False,
    "image_srcset": ["2x"],
    "write_computation_times": False,
}


def setup(app: Sphinx) -> None:
    """Connect what is below to the build."""
    for module in ("implicitdiff.implicit", "implicitdiff._problems"):
        # A page shows the one signature that runs. Overloads are for type checkers.
        overloaded = ModuleAnalyzer.for_module(module)
        overloaded.analyze()
        overloaded.overloads.clear()
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("source-read", underline_title)
    app.connect("doctree-read", strip_code)
    app.connect("env-check-consistency", check_complete)


def skip_fields(app: Sphinx, what: str, name: str, member: object, *_: object) -> bool | None:
    """Leave fields of NamedTuples to the docstring of the class."""
    return True if type(member).__name__ == "_tuplegetter" else None


def underline_title(app: Sphinx, docname: str, source: list[str]) -> None:
    """Make the first line of an example's docstring, which is plain text there, the title of its page."""
    if docname.startswith("gallery/"):
        source[0] = re.sub(
            r"(\n\.\. _sphx_glr_gallery_\S+:\n\n+)(\w.*?)\.?\n\n",
            lambda match: f"{match[1]}{match[2]}\n{'=' * len(match[2])}\n\n",
            source[0],
            count=1,
        )


def strip_code(app: Sphinx, doctree: nodes.document) -> None:
    """Take the empty line off the end of a block, which doctest needs in Markdown."""
    for block in doctree.findall(nodes.literal_block):
        if block.rawsource == block.astext():
            block.rawsource = block.rawsource.rstrip("\n")
            block[:] = [nodes.Text(block.rawsource)]


def check_complete(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn of public names that no page lists."""
    documented = {id(pydoc.locate(name)) for name in env.domains.python_domain.objects}
    public = (value for name, value in vars(implicitdiff).items() if not name.startswith("_"))
    for module in (implicitdiff, *filter(inspect.ismodule, public)):
        for name in module.__all__:
            if id(getattr(module, name)) not in documented:
                logging.getLogger(__name__).warning("%s.%s is on no page of docs/api", module.__name__, name)
