"""Sphinx configuration of the documentation site; `make docs` builds it into build/docs.

The pages are the Markdown files of this folder. What is generated from the code (`reference/`) and what the site does
otherwise than a forge that shows the same files is in `_ext/kvsite`. Nothing here needs a network.
"""

from __future__ import annotations

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "_ext"))

project = "kvpolicy"
author = "the kvpolicy authors"
copyright = "the kvpolicy authors, Apache-2.0"  # noqa: A001
version = release = installed_version("kvpolicy")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "kvsite"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
root_doc = "index"
exclude_patterns = ["_ext", "_static"]
nitpicky = True
nitpick_ignore_regex = [
    # What other projects document (their inventories could not be read without a network), and what annotations name
    # without being public. Names of this package that are public, functions and pages are held to.
    ("py:.*", r"(?!kvpolicy)[\w.]+"),
    ("py:.*", r".*[\['\"].*"),
    ("py:(class|obj|data|attr)", r"kvpolicy\.[a-z]\w*\..*"),
]
suppress_warnings = ["ref.python"]  # names of attributes in lists that napoleon makes fit several classes
default_role = "kv"

myst_enable_extensions = ["attrs_block", "colon_fence", "deflist"]
myst_heading_anchors = 6

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "separated"
autodoc_preserve_defaults = True
autodoc_use_type_comments = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Class attributes", "params_style")]
python_maximum_signature_line_length = 100
add_module_names = False

html_theme = "furo"
html_title = f"kvpolicy {release}"
html_short_title = "kvpolicy"
html_static_path = ["_static"]
html_css_files = ["kvpolicy.css"]
html_favicon = "_static/favicon.svg"
html_copy_source = False  # kvsite writes the Markdown of every page beside it
html_show_sourcelink = False
html_show_sphinx = False
html_last_updated_fmt = None
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b57a4", "color-brand-content": "#0b57a4"},
    "dark_css_variables": {"color-brand-primary": "#79b8ff", "color-brand-content": "#79b8ff"},
    "navigation_with_keys": True,
}
pygments_style = "default"
pygments_dark_style = "github-dark"
highlight_language = "text"

linkcheck_timeout = 20
linkcheck_anchors = False
