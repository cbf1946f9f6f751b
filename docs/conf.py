"""Sphinx settings: MyST pages, the furo theme, and the public classes by autodoc."""

import octavo

project = "Octavo"
author = "The Octavo authors"
copyright = "The Octavo authors"
release = version = octavo.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"Octavo {release}"

autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
nitpicky = False
