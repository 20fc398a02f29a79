"""The API pages, made from every module's `__all__`, and the check that no public name lacks one.

`{public-names} jax_scalegmn.matching` documents a module: its docstring, a table of its names, and each name in full.
A name is documented once, at its home: the package that defines it. Other faces that export it link there. The role
{sg}`matching.weight_matching` links to a name from any page.
"""

import importlib
import inspect
import itertools
import pkgutil
import re
import typing
from typing import Any

from checks import PACKAGE, home, public_modules, undocumented
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.domains.python import PyXRefRole
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

FIELD = re.compile(r"^Alias for field number \d+$")


class PublicNames(SphinxDirective):
    """Documents a public module."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        module = self.arguments[0]
        if module not in public_modules():
            raise self.error(f"{module!r}: expected a public module, one of {sorted(public_modules())}.")
        face = importlib.import_module(module)
        homes = {name: home(module, name) for name in face.__all__}
        lines = [f".. automodule:: {module}", "   :no-members:", "", ".. list-table::", "   :class: public-names", ""]
        for name, full in homes.items():
            lines += [f"   * - :py:obj:`{name} <{full}>`", f"     - {_first_sentence(full, getattr(face, name))}"]
        lines.append("")
        for name, full in homes.items():
            value = getattr(face, name)
            if full == f"{module}.{name}" and not inspect.ismodule(value):
                lines += _documented(full, value)
        return self.parse_text_to_nodes("\n".join(["```{eval-rst}", *lines, "```"]))


def _documented(full: str, value: Any) -> list[str]:
    """The directive that documents a value."""
    if _is_data(value):
        module, _, name = full.rpartition(".")
        docstring = [f"   {_escaped(line)}" for line in _data_docstring(full)]
        return [f".. py:data:: {name}", f"   :module: {module}", "", *docstring, ""]
    if inspect.isclass(value):
        return [f".. {'autoexception' if issubclass(value, BaseException) else 'autoclass'}:: {full}", ""]
    return [f".. autofunction:: {full}", ""]


def _first_sentence(full: str, value: Any) -> str:
    lines = _data_docstring(full) if _is_data(value) else (inspect.getdoc(value) or "").splitlines()
    paragraph = " ".join(line.strip() for line in itertools.takewhile(str.strip, lines))
    sentence = re.split(r"(?<=\.)(?<!et al\.)(?<!e\.g\.)(?<!i\.e\.)\s", paragraph)[0].strip()
    return _escaped(re.sub(r":+$", ".", sentence))


def _is_data(value: Any) -> bool:
    """Whether a value is a constant or a type alias, whose docstring is not its own."""
    if inspect.ismodule(value) or inspect.isclass(value):
        return typing.get_origin(value) is not None
    return not (callable(value) and hasattr(value, "__name__")) or typing.get_origin(value) is not None


def _data_docstring(full: str) -> list[str]:
    """The string below a constant or a type alias, where it is defined: in its module or a private one next to it."""
    module, _, name = full.rpartition(".")
    face = importlib.import_module(module)
    private = [f"{module}.{info.name}" for info in pkgutil.iter_modules(getattr(face, "__path__", ()))]
    for place in (module, *private):
        found = ModuleAnalyzer.for_module(place).find_attr_docs().get(("", name))
        if found:
            return list(found)
    return []


# --- docstrings ---------------------------------------------------------------------------------------------------


def plain_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Lets docstrings be plain text: bars and asterisks mark nothing, lists need no blank lines around them, and an
    indented block after a colon is code.
    """
    lines[:] = _with_blank_lines_around_lists(lines)
    result: list[str] = []
    example = False
    for number, line in enumerate(lines):
        example = bool(line.strip()) and (example or line.lstrip().startswith(">>>"))
        if example:
            result.append(line)
            continue
        following = next((later for later in lines[number + 1 :] if later.strip()), "")
        blank_next = number + 1 < len(lines) and not lines[number + 1].strip()
        begins_block = line.rstrip().endswith(":") and not line.rstrip().endswith("::") and blank_next
        if begins_block and _indent(following) > _indent(line) and not _is_item(following):
            line = line.rstrip() + ":"
        result.append(_escaped(line))
    lines[:] = result


def _with_blank_lines_around_lists(lines: list[str]) -> list[str]:
    result: list[str] = []
    items: int | None = None  # the indent of the list that we are in
    for line in lines:
        if line.strip() and result and result[-1].strip():
            begins = _is_item(line) and items is None
            ends = items is not None and (_indent(line) < items or (_indent(line) == items and not _is_item(line)))
            if begins or ends:
                result.append("")
        if _is_item(line):
            items = _indent(line)
        elif line.strip() and items is not None and _indent(line) <= items:
            items = None
        result.append(line)
    return result


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _is_item(line: str) -> bool:
    return line.lstrip().startswith("- ")


def _escaped(line: str) -> str:
    """The line with its bars and asterisks escaped, save in backticks, and `name`s allowed."""
    parts = re.split(r"(`+[^`]*`+)", line)
    for index, part in enumerate(parts):
        if not part.startswith("`"):
            text = re.sub(r"([|*])", r"\\\1", part)
            parts[index] = f"\\ {text}" if index and text[:1].isalnum() else text
    return "".join(parts)


def skip_fields(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leaves out the fields of named tuples: their class describes them under "Attributes"."""
    return True if FIELD.match(str(getattr(obj, "__doc__", "") or "")) else None


def plain_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Writes arrays as they are imported, and leaves out what Flax adds to every module: `parent` and `name`."""
    signature, returns = (text and text.replace("jaxlib._jax.Array", "Array") for text in (signature, returns))
    if what == "class" and signature and "parent:" in signature:
        signature = re.sub(r",? parent: .*?, name: .*?(?=[,)])", "", signature)
    return signature, returns


# --- references ---------------------------------------------------------------------------------------------------


class PublicNameRole(PyXRefRole):
    """`matching.weight_matching` as a link to jax_scalegmn.matching.weight_matching."""

    def process_link(
        self, env: BuildEnvironment, refnode: nodes.Element, has_explicit_title: bool, title: str, target: str
    ) -> tuple[str, str]:
        title, target = super().process_link(env, refnode, has_explicit_title, title, target)
        refnode["refdomain"], refnode["reftype"] = "py", "obj"
        module, _, name = f"{PACKAGE}.{target}".rpartition(".")
        exists = module in public_modules() and hasattr(importlib.import_module(module), name)
        return title, home(module, name) if exists else f"{PACKAGE}.{target}"


def resolve_short_names(
    app: Sphinx, env: BuildEnvironment, node: nodes.Element, contnode: nodes.Element
) -> nodes.Element | None:
    """Resolves `symmetry.act` and `sg.symmetry.act` in docstrings to jax_scalegmn.symmetry.act."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or target.startswith(PACKAGE):
        return None
    full = f"{PACKAGE}.{target.removeprefix('sg.')}"
    domain = env.domains["py"]
    if full not in domain.objects:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", full, node, contnode)


def check(app: Sphinx, exception: Exception | None) -> None:
    """Fails the build if a public name has no page."""
    if exception is not None or app.builder.format != "html":
        return
    domain = app.env.domains["py"]
    lacking = undocumented(set(domain.objects) | set(domain.modules))
    if lacking:
        raise ExtensionError("Public names without a page in docs/api:\n" + "\n".join(lacking))


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("public-names", PublicNames)
    app.add_role("sg", PublicNameRole())
    # Before napoleon, whose sections end in a colon as well.
    app.connect("autodoc-process-docstring", plain_docstring, priority=400)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("autodoc-process-signature", plain_signature)
    app.connect("missing-reference", resolve_short_names)
    app.connect("build-finished", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
