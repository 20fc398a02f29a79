"""The documentation's parts that are code: tables from result files, the check of public names, the check of links."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from experiments import merging

DOCS = Path(__file__).resolve().parents[1] / "docs"
COMMANDS = ("python -m experiments.", "python -m benchmarks.", "python tests/fuzzing.py ", "jax-scalegmn sweep make ")
PLACES = ("middle", "repaired")
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")


def load(name):
    """A file of docs/ as a module: the folder is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables, checks = load("tables"), load("checks")


@pytest.fixture(scope="module")
def results():
    return tables.Results()


def cells(table, row, column):
    """The numbers in the cell of the row that begins with a name."""
    found = [cells for cells in table.rows if cells[0] == row]
    assert len(found) == 1
    return [float(number.replace(",", "")) for number in NUMBER.findall(found[0][table.header.index(column)])]


@pytest.mark.parametrize("name", tables.TABLES)
def test_every_table_has_rows_a_command_and_its_files(name, results):
    table = tables.TABLES[name](results)
    assert table.rows
    assert all(len(row) == len(table.header) for row in table.rows)
    assert table.command.startswith(COMMANDS)
    words = (
        table.command.removeprefix("jax-scalegmn sweep make ")
        .removeprefix("python -m ")
        .removeprefix("python ")
        .split()
    )
    file = words[0] if words[0].endswith((".py", ".toml")) else f"{words[0].replace('.', '/')}.py"
    assert (DOCS.parent / file).is_file()
    assert all((tables.RESULTS / source).is_file() for source in table.sources)
    assert tables.markdown(table).count("\n|") == len(table.rows) + 2


def test_the_numbers_of_inrs_are_those_of_the_file(results):
    table = tables.inr_methods(results)
    methods = json.loads((tables.RESULTS / "digits.json").read_text())["merging"]["independent fits"]
    assert [row[0] for row in table.rows] == [method["label"] for method in methods.values()]
    for method in methods.values():
        wanted = [method["midpoint"][key] for key in ("mean", "low", "high")]
        assert cells(table, method["label"], "midpoint") == [round(number, 4) for number in wanted]
        assert cells(table, method["label"], "barrier") == [round(method["barrier"]["mean"], 4)]


def test_the_numbers_of_merging_are_means_over_the_pairs_of_the_file(results):
    table = tables.merging_mnist(results)
    network = json.loads((tables.RESULTS / "merging_mnist.json").read_text())["pairs"]["mlp:784-64-64-10,relu"]
    for method in network["methods"].values():
        pairs = method["pairs"]
        plain, repaired = (100 * sum(pair[key]["accuracy"] for pair in pairs) / len(pairs) for key in PLACES)
        assert cells(table, method["label"], "784-64-64-10") == pytest.approx([plain, repaired], abs=0.05001)


def test_the_numbers_of_json_lines_are_those_of_the_one_row_that_fits(results):
    table = tables.recovery(results)
    lines = [json.loads(line) for line in (tables.RESULTS / "recovery.jsonl").read_text().splitlines()]
    for line in lines:
        shown = cells(table, f"`{line['network']}`", f"noise {line['noise']:g}")
        assert shown == pytest.approx([100 * line["forward"], 100 * line["identity"]], abs=0.5001)


def test_a_changed_number_changes_the_table(tmp_path, results):
    shutil.copy(tables.RESULTS / "digits.json", tmp_path)
    changed = json.loads((tmp_path / "digits.json").read_text())
    changed["merging"]["independent fits"]["naive"]["midpoint"]["mean"] = 0.5
    (tmp_path / "digits.json").write_text(json.dumps(changed))
    table = tables.inr_methods(tables.Results(tmp_path))
    assert cells(table, "naive", "midpoint")[0] == 0.5
    assert table.rows[1:] == tables.inr_methods(results).rows[1:]


def test_a_missing_key_row_or_file_is_an_error(tmp_path):
    shutil.copy(tables.RESULTS / "digits.json", tmp_path)
    lacking = json.loads((tmp_path / "digits.json").read_text())
    del lacking["merging"]["independent fits"]["naive"]["barrier"]
    (tmp_path / "digits.json").write_text(json.dumps(lacking))
    with pytest.raises(KeyError, match="barrier"):
        tables.inr_methods(tables.Results(tmp_path))
    lines = (tables.RESULTS / "recovery.jsonl").read_text().splitlines()
    (tmp_path / "recovery.jsonl").write_text("\n".join(lines[1:]))
    with pytest.raises(ValueError, match=r"expected one row with .*'noise': 0\.0.*got 0"):
        tables.recovery(tables.Results(tmp_path))
    with pytest.raises(ValueError, match=r"cnn_digits\.json: expected a result file"):
        tables.cnn_digits_relu(tables.Results(tmp_path))


def test_a_network_that_no_column_names_is_an_error(tmp_path):
    file = json.loads((tables.RESULTS / "merging_cifar.json").read_text())
    file["pairs"]["mlp:1-2-3,relu"] = next(iter(file["pairs"].values()))
    (tmp_path / "merging_cifar.json").write_text(json.dumps(file))
    with pytest.raises(ValueError, match="expected the networks"):
        tables.merging_cifar(tables.Results(tmp_path))


def test_pages_name_only_tables_and_numbers_that_exist(results):
    values = tables.values(results)
    pages = [path for path in DOCS.glob("**/*.md") if not {"_build", "_generated"} & set(path.parts)]
    text = "\n".join(path.read_text() for path in pages)
    included = set(re.findall(r"_generated/(\w+)\.md", text))
    assert included == {*tables.TABLES, *tables.ACCELERATOR_TABLES}
    named = set(re.findall(r"\{\{ (\w+)\.(\w+) \}\}", text))
    assert named
    assert {(topic, name) for topic, name in named if name not in values.get(topic, {})} == set()


def test_writing_leaves_unchanged_tables_alone(tmp_path, results):
    first = {path: path.stat().st_mtime_ns for path in tables.write(results, tmp_path)}
    assert len(first) == len(tables.TABLES | tables.ACCELERATOR_TABLES)
    assert {path: path.stat().st_mtime_ns for path in tables.write(results, tmp_path)} == first


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A package with a private file, a public module, and names that they export."""
    package = tmp_path / "planted_package"
    package.mkdir()
    (package / "__init__.py").write_text("from planted_package._hidden import f, g\n__all__ = ['f', 'g']\n")
    (package / "_hidden.py").write_text("def f():\n    pass\n\n\ndef g():\n    pass\n")
    (package / "shown.py").write_text("LIMIT = 3\n__all__ = ['LIMIT']\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield package
    for name in [name for name in sys.modules if name.startswith("planted_package")]:
        del sys.modules[name]
    checks.public_modules.cache_clear()
    checks.home.cache_clear()


def test_a_public_name_without_a_page_is_found(planted):
    documented = {"planted_package", "planted_package.f", "planted_package.shown", "planted_package.shown.LIMIT"}
    assert checks.undocumented(documented | {"planted_package.g"}, "planted_package") == []
    assert checks.undocumented(documented, "planted_package") == ["planted_package.g: no page documents it"]
    lacking = checks.undocumented(documented - {"planted_package.shown"}, "planted_package")
    assert lacking[0] == "planted_package.shown: no page documents this module"


def test_a_public_module_without_names_is_an_error(planted):
    (planted / "bare.py").write_text("def f():\n    pass\n")
    with pytest.raises(ValueError, match=r"planted_package\.bare: expected __all__"):
        checks.public_modules("planted_package")


def test_a_name_is_documented_where_it_is_defined(planted):
    assert checks.home("planted_package", "f", "planted_package") == "planted_package.f"
    assert checks.home("jax_scalegmn", "Axis") == "jax_scalegmn.architecture.Axis"
    assert checks.home("jax_scalegmn", "matching") == "jax_scalegmn.matching"


def test_every_public_module_has_an_api_page():
    text = "\n".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    assert set(re.findall(r"\{public-names\} ([\w.]+)", text)) == set(checks.public_modules())


def test_broken_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<h1 id="top-of-a"></h1><a href="b.html#here">b</a><a href="https://x.org">x</a>')
    (tmp_path / "b.html").write_text('<p id="here"></p><a href="a.html#top-of-a">a</a><img src="no.png">')
    (tmp_path / "c.html").write_text('<a href="a.html#gone">a</a>')
    assert checks.broken_links(tmp_path) == [
        "b.html: no.png leads to no file of the site",
        "c.html: a.html#gone leads to no anchor of that page",
    ]


def test_tables_of_an_accelerator_say_so_where_nothing_is_measured(tmp_path, results):
    shutil.copytree(tables.RESULTS, tmp_path / "results", ignore=shutil.ignore_patterns(tables.ACCELERATOR))
    tables.write(tables.Results(tmp_path / "results"), tmp_path / "generated")
    assert (tmp_path / "generated" / "accelerator_rates.md").read_text() == tables.NOT_MEASURED
    rate = {"section": "rates", "benchmark": "memory", "mib": 7, "gb_per_second": 3210.0}
    failed = {"section": "rates", "error": "lost"}
    model = {
        "section": "inr",
        "benchmark": "training_step",
        "network": "siren",
        "dtype": "bfloat16",
        "batch_size": 8,
        "graphs_per_second": 5000.0,
        "gflop_per_graph": 3.0,
        "share_of_matmul_rate": 0.25,
        "compile_seconds": 31.0,
        "peak_mib": 1234.0,
    }
    environment = {"environment": {"device": "Card x 1", "jax": "0"}}
    lines = [json.dumps(row | environment) for row in (failed, rate, model)]
    (tmp_path / "results" / tables.ACCELERATOR).write_text("\n".join(lines))
    tables.write(tables.Results(tmp_path / "results"), tmp_path / "generated")
    assert "| pass over 7 MiB | 3,210 GB/s |" in (tmp_path / "generated" / "accelerator_rates.md").read_text()
    assert "| 15.0 | 25% | 31 | 1,234 |" in (tmp_path / "generated" / "accelerator_models.md").read_text()
    assert (tmp_path / "generated" / "accelerator_jobs.md").read_text() == tables.NOT_MEASURED


def test_without_enchant_pages_are_built_and_the_spelling_is_refused_by_name(monkeypatch, capsys):
    pytest.importorskip("sphinx", reason="of the extra docs")
    monkeypatch.setattr(sys, "path", [str(DOCS), *sys.path])
    monkeypatch.setitem(sys.modules, "enchant", None)  # as where the C library is missing: ImportError
    build = load("build")
    monkeypatch.setitem(sys.modules, "build", build)
    assert "sphinxcontrib.spelling" not in load("conf").extensions
    with pytest.raises(SystemExit):
        build.main(["--no-notebooks"])
    assert "libenchant-2-2 and hunspell-en-us; got none" in " ".join(capsys.readouterr().err.split())


def test_commands_leave_out_the_options_that_have_their_defaults():
    defaults = merging.MatchConfig()
    for options in tables.FUNCTION_OPTIONS.values():
        assert options == {name: getattr(defaults, name) for name in options}
