"""Builds the documentation into docs/_build/html and checks it: one command.

    pip install -e '.[docs]'
    python docs/build.py                  # every notebook is executed; any warning is an error
    python docs/build.py --no-notebooks   # prose and API alone

Checked are the notebooks, all references and links inside the site, that every public name has a page, and the
spelling (by enchant: Debian's packages libenchant-2-2 and hunspell-en-us). Other sites are not asked.
"""

import argparse
import sys
import time
from pathlib import Path

from sphinx.cmd.build import main as sphinx_build

HERE = Path(__file__).resolve().parent


def finds_enchant() -> bool:
    """Whether pyenchant finds the library that it needs."""
    try:
        import enchant  # noqa: F401
    except ImportError:
        return False
    return True


def main(arguments: list[str] | None = None) -> int:
    """Builds, then checks the spelling of what was read.

    Returns:
      0, or what Sphinx returned for the first step that failed.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-notebooks", action="store_true", help="show the notebooks without executing them")
    parser.add_argument("--no-spelling", action="store_true", help="leave out the spelling, which needs enchant")
    options = parser.parse_args(arguments)
    if not options.no_spelling and not finds_enchant():
        parser.error(
            "the spelling needs the library enchant and its English words, Debian's packages libenchant-2-2 and "
            "hunspell-en-us; got none. Install them, or leave out the spelling by --no-spelling."
        )
    output = HERE / "_build"
    settings = ["-D", "nb_execution_mode=off"] if options.no_notebooks else []
    builders = ["html"] if options.no_spelling else ["html", "spelling"]
    for builder in builders:
        begin = time.perf_counter()
        # One folder of parsed pages for both builders, so that every notebook runs once.
        places = ["-d", str(output / "doctrees"), str(HERE), str(output / builder)]
        status = sphinx_build(["-q", "-W", "--keep-going", "-b", builder, *settings, *places])
        print(f"{builder}: {'failed' if status else 'passed'} in {time.perf_counter() - begin:.0f} s", flush=True)
        if status:
            return status
    print(f"The site begins at {output / 'html' / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
