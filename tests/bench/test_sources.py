"""The hash of a record's sources covers everything that its numbers depend on, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import provenance, sources
from bench.provenance import checkout_environment
from bench.sources import MEASURED_BY, dependencies, sources_hash
from bench.suite.session import Session

TREE = {
    "gircse/__init__.py": "if TYPE_CHECKING:\n    from gircse.late import Late\n    from gircse.unused import Unused\n",
    "gircse/late.py": "",
    "gircse/unused.py": "",
    "gircse/ops/__init__.py": "from . import early\n",
    "gircse/ops/early.py": "def f():\n    importlib.import_module(f'gircse_kernels.{f}')\n",
    "gircse/ops/other.py": "",
    "kernels/gircse_kernels/__init__.py": "",
    "kernels/gircse_kernels/one.py": "from ..gircse_kernels import two\n",
    "kernels/gircse_kernels/two.py": "",
    "kernels/gircse_kernels/table.json": "{}",
    "kernels/gircse_kernels/notes.txt": "",
    "bench/__init__.py": "",
    "bench/measure.py": "from gircse import Late\nimport bench.tables\ndef f():\n    from gircse.ops import early\n",
    "bench/tables.py": "import gircse.unused\n",
}


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    for name, text in TREE.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    packages = {package: tmp_path / folder for package, folder in
                (("gircse", "gircse"), ("gircse_kernels", "kernels/gircse_kernels"), ("bench", "bench"))}  # fmt: skip
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    monkeypatch.setattr(sources, "_PACKAGES", packages)
    monkeypatch.setattr(sources, "MEASURED_BY", {"some": ("bench.measure",)})
    _forget()
    yield tmp_path
    _forget()


def _forget() -> None:
    for function in (sources.modules, sources.imports, sources._home, sources_hash):
        function.cache_clear()


def test_every_form_of_import_is_followed(tree):
    found = {path.relative_to(tree).as_posix() for path in dependencies(("bench.measure",)).values()}
    left_out = {"gircse/unused.py", "gircse/ops/other.py", "bench/tables.py", "kernels/gircse_kernels/notes.txt"}
    assert found == TREE.keys() - left_out
    with pytest.raises(ValueError, match="got 'bench.none', expected a module of this checkout"):
        dependencies(("bench.none",))


@pytest.mark.parametrize("name", TREE)
def test_a_change_of_any_dependency_changes_the_hash(tree, name):
    depends = tree / name in dependencies(("bench.measure",)).values()
    before = sources_hash("some")
    with (tree / name).open("a") as file:
        file.write("\n")
    _forget()
    assert (sources_hash("some") != before) == depends


def test_kinds_of_records_depend_on_what_they_measure():
    found = {kind: dependencies(roots).keys() for kind, roots in MEASURED_BY.items()}
    attention = next(name for name in sources.modules() if name.startswith("gircse.") and name.endswith(".attention"))
    assert {kind for kind, names in found.items() if attention in names} >= {
        "throughput", "corpus", "training", "big-batch", "plan", "quality", "scaling", "tests",
    }  # fmt: skip
    assert not {"op", "soft_embed", "info_nce", "kernels-compile"} & {k for k, n in found.items() if attention in n}
    assert all("gircse_kernels.launching" in names for names in found.values())
    assert all("kernels/gircse_kernels/configs.json" in names for names in found.values())
    assert "bench.timing" in found["op"]
    assert "bench.tables" not in found["op"]
    # `bench.run` and the GPU suite measure the ceilings, and make the model from random weights of a published shape
    assert {kind for kind, names in found.items() if "bench.floors" in names} >= {
        "op",
        "throughput",
        "training",
        "corpus",
    }
    assert {kind for kind, names in found.items() if "bench.shapes" in names} >= {
        "op",
        "throughput",
        "training",
        "corpus",
    }
    assert "tests.conftest" in found["tests"]


def test_a_file_that_was_edited_during_the_run_leaves_no_hash(tmp_path, monkeypatch):
    assert provenance.provenance("cpu", "op")["sources"] == sources_hash("op")
    monkeypatch.setattr(provenance, "_STARTED", 0.0)
    assert provenance.provenance("cpu", "op")["sources"] is None
    session = Session(tmp_path, torch.device("cpu"), minutes=1.0, smoke=True)
    assert session.save("op", {"benchmark": "op"})["provenance"]["sources"] is None


def test_what_python_loads_was_found():
    """Modules that are loaded by importing the measuring ones, against those that were found by reading them."""
    code = f"import sys, {', '.join(MEASURED_BY['training'])}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=checkout_environment(), capture_output=True, text=True)
    loaded = {name for name in done.stdout.split() if name in sources.modules()}
    assert len(loaded) > 50
    assert loaded - sources._SHOWS <= dependencies(MEASURED_BY["training"]).keys()
