"""The sdist and the wheel, installed where nothing of the checkout can be seen.

A virtual environment of its own gets the package by pip; torch and transformers, hundreds of megabytes, are lent by the
environment that runs the tests, and come after it on the path.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]

SMOKE = """
import importlib.metadata, importlib.resources, json, sys
import torch
import gircse, gircse_kernels
from gircse.ops import soft_embed
from gircse_kernels import plan

hidden = torch.randn(3, 16, requires_grad=True)
out, stats = soft_embed(hidden, torch.randn(40, 16), top_k=5, return_stats=True)
out.sum().backward()
print(json.dumps({
    "homes": [str(module.__file__) for module in (gircse, gircse_kernels, plan)],
    "typed": [importlib.resources.files(p).joinpath("py.typed").is_file() for p in (gircse, gircse_kernels)],
    "table": sorted(plan.table()),
    "version": [gircse.__version__, importlib.metadata.version("gircse")],
    "finite": bool(hidden.grad.isfinite().all()),
    "model": gircse.GIRCSE.__module__,
}))
"""


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from what the sdist unpacks to."""
    folder = tmp_path_factory.mktemp("archives")
    build(ROOT, "sdist", folder, egg_base=folder)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    build(source, "wheel", folder)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def build(source: Path, kind: str, folder: Path, egg_base: Path | None = None) -> None:
    """The hook that `pip` and `build` call, in this environment: nothing is downloaded."""
    # no *.egg-info may be left in the checkout
    configure = "" if egg_base is None else f"sys.argv[1:1] = ['egg_info', '--egg-base', {str(egg_base)!r}];"
    script = f"import sys, setuptools.build_meta as backend;{configure}backend.build_{kind}({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", script], cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_the_archives_hold(archives: tuple[Path, Path]) -> None:
    sdist, wheel = archives
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"gircse", "gircse_kernels"}
    for package, folder in (("gircse", ROOT / "gircse"), ("gircse_kernels", ROOT / "kernels" / "gircse_kernels")):
        for file in folder.rglob("*.py"):
            assert f"{package}/{file.relative_to(folder).as_posix()}" in names, file
        assert f"{package}/py.typed" in names
    assert "gircse_kernels/configs.json" in names
    assert any(name.endswith("/LICENSE") for name in names)
    with tarfile.open(sdist) as archive:
        inside = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE", "kernels/gircse_kernels/configs.json"} <= inside


def test_installed_in_an_environment_of_its_own(archives: tuple[Path, Path], tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True, timeout=120)
    scripts = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment["TRITON_INTERPRET"] = "0"

    def run(*command: str, **options: object) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", str(python))
    run(*pip, "install", "--no-deps", "--no-index", str(archives[1]))
    (packages,) = json.loads(run(str(python), "-c", "import json, site; print(json.dumps(site.getsitepackages()[:1]))"))
    lent = [sysconfig.get_path("purelib"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    lent = [path for path in lent if path and not (Path(path) / "gircse_kernels").exists()]
    (Path(packages) / "lent.pth").write_text("\n".join(lent) + "\n")
    found = json.loads(run(str(python), "-c", SMOKE))
    assert all(home.startswith(packages) for home in found["homes"])
    assert found["typed"] == [True, True]
    assert "few_rows" in found["table"]
    assert len(set(found["version"])) == 1
    assert found["finite"]
    assert found["model"] == "gircse.model"
    version = run(str(scripts / "gircse"), "--version")
    assert version.split() == ["gircse", found["version"][0]]
