"""Configuration of the documentation site: `sphinx-build -W -n docs docs/_build`.

The build generates tables and figures from the code (`directives.py`, `figures.py`), and the
reference from docstrings (`docstrings.py`). So pages contain no copies that can become outdated.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import mvit_jax  # noqa: E402

project = "mvit_jax"
author = "the authors of mvit_jax"
version = release = mvit_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "docstrings",
    "directives",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
nitpicky = True
# No intersphinx: the site builds without a network.
nitpick_ignore_regex = [
    ("py:class", r"(fractions|io|multiprocessing|posix)\..*|mvit_jax\..*\.T"),
    ("py:.*", r"(jax|jaxlib|jaxtyping|flax|optax|orbax|grain|numpy|av|PIL|matplotlib)\b.*"),
    ("py:.*", r"Array|ndarray|'.*'"),  # arrays and shapes of jaxtyping
    ("py:.*", r"(np|nnx|contextlib|ml_collections|typing|collections|os|pathlib|absl)\b.*"),
]

smartquotes = False  # True turns the two hyphens of a flag into a dash
# Generates anchors for headings down to level 3, as targets of links.
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_attr_annotations = False  # signatures have the annotations
python_maximum_signature_line_length = 80
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"mvit_jax {release}"
html_show_copyright = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
