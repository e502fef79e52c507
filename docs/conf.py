"""Sphinx builds the site: `sphinx-build -W docs site`. It knows the roles that the docstrings use, and checks links."""

import maskprop

project = "maskprop"
author = copyright = "the maskprop authors"
release = version = maskprop.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"maskprop {release}"
html_static_path: list[str] = []
exclude_patterns: list[str] = []

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_ivar = True
