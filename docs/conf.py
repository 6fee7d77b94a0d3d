"""How Sphinx builds the site: `make docs`."""

from hf_adanorm import __version__

project = "hf_adanorm"
author = "The hf_adanorm authors"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
exclude_patterns = ["_build", "measured"]  # the latter is written by a command
myst_heading_anchors = 3  # links to a heading of a page are checked
default_role = "code"  # docstrings write `names` with one backtick
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"undoc-members": True}
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = "hf_adanorm"
html_theme_options = {"navigation_with_keys": True, "light_css_variables": {"code-font-size": "78%"}}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
