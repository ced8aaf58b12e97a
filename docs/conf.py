"""Sphinx's settings: `make docs` builds the site, with warnings as errors."""

import os
from pathlib import Path

os.environ.setdefault("FUSEDRNN_PROFILE", "none")
ROOT = Path(__file__).parents[1]

project = "fusedrnn"
author = "the fusedrnn authors"
copyright = author
version = release = (ROOT / "fusedrnn" / "version.py").read_text().split('"')[-2]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
nitpicky = False
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autoclass_content = "class"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

html_theme = "furo"
html_title = f"fusedrnn {version}"
html_static_path = []
html_show_sourcelink = False
