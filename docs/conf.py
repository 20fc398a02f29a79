"""How Sphinx builds the documentation: `python docs/build.py` from the repository's root."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "_ext")]

import build  # noqa: E402
import tables  # noqa: E402

project = "jax_scalegmn"
author = "the authors of jax_scalegmn"
copyright = author
html_title = "jax_scalegmn"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
    *(["sphinxcontrib.spelling"] if build.finds_enchant() else []),
    "generated_pages",
    "internal_links",
    "mathml",
    "public_names",
]
exclude_patterns = ["_build", "_generated", "**/.ipynb_checkpoints"]

# --- pages --------------------------------------------------------------------------------------------------------

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath", "substitution"]
myst_heading_anchors = 3
# Every number that a sentence of the results pages names; see docs/tables.py.
myst_substitutions = tables.values(tables.Results())
bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "alpha"
bibtex_reference_style = "author_year"

# --- notebooks ----------------------------------------------------------------------------------------------------

# `python docs/build.py --no-notebooks` sets this to "off".
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 900
nb_execution_show_tb = True
nb_merge_streams = True
nb_mime_priority_overrides = [("spelling", "text/plain", 1)]
nb_render_markdown_format = "myst"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Notebooks compile the same programs in every build; only the first one pays.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(HERE / "_build" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # to compile takes most of a notebook's time

# --- API ----------------------------------------------------------------------------------------------------------

autodoc_default_options = {"members": True, "special-members": "__call__", "member-order": "bysource"}
autodoc_inherit_docstrings = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_use_rtype = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
add_module_names = False
toc_object_entries_show_parents = "hide"
default_role = "py:obj"

# --- checks -------------------------------------------------------------------------------------------------------

# References inside the project must resolve; nothing is fetched from other projects' sites.
nitpicky = True
# A notebook names its language when it runs; --no-notebooks shows it plain.
suppress_warnings = ["myst-nb.lexer"]
nitpick_ignore_regex = [
    ("py:.*", r"(?s)(?!jax_scalegmn\b).*"),
    ("py:class", r"jax_scalegmn\.(network\._forward\.State|stacks\.Function)"),  # type variables
]
spelling_lang = "en_US"
spelling_word_list_filename = ["spelling_wordlist.txt"]
spelling_show_suggestions = False
spelling_ignore_pypi_package_names = False
spelling_ignore_contributor_names = False
spelling_warning = True
spelling_exclude_patterns = ["bibliography.md"]

# --- looks --------------------------------------------------------------------------------------------------------

html_math_renderer = "mathml"
html_theme = "sphinx_book_theme"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "show_toc_level": 2,
    "show_navbar_depth": 1,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "home_page_in_toc": False,
    "navbar_persistent": [],
    "pygments_light_style": "friendly",
    "pygments_dark_style": "monokai",
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
