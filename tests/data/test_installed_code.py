from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from gircse.data import installed_code
from gircse.data.functions import CodePair
from gircse.data.installed_code import deduplicate, evaluation_set, harvest, split, to_rows
from gircse.data.rows import Row


def write(root: Path, name: str, text: str | bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def function(summary: str) -> str:
    return f'def g(a):\n    """{summary}"""\n    x = "{summary}"\n    y = x + x\n    return y\n\n'


def test_tests_vendored_code_and_broken_files_are_skipped(tmp_path):
    good = function("Return what the good function is known for.")
    folders = (
        "pkg/tests",
        "pkg/_vendor",
        "pkg/third_party",
        "pkg/externals",
        "pkg/sub/testing",
        "pkg/a.dist-info",
        "gircse",
    )
    files = ("test_m.py", "m_test.py", "conftest.py", "m.txt", "data.pyi")
    for i, name in enumerate([*(f"{folder}/m.py" for folder in folders), *(f"pkg/{file}" for file in files)]):
        write(tmp_path, name, function(f"Return number {i} of the skipped ones."))
    broken = [
        good + "def (:\n",
        good.encode() + b"# \xff\n",
        good.encode() + b"\0",
        good + "x = " + "(" * 5000 + ")" * 5000,
        "",
    ]
    for i, content in enumerate(broken):
        write(tmp_path, f"pkg/broken_{i}.py", content)
    os.symlink(tmp_path / "nowhere", tmp_path / "pkg" / "dangling.py")
    (tmp_path / "pkg" / "folder.py").mkdir()
    assert harvest([tmp_path]) == []
    write(tmp_path, "pkg/good.py", "\ufeff" + good)
    assert [p.module for p in harvest([tmp_path], progress=True)] == ["pkg.good"]
    assert harvest([tmp_path / "missing"]) == []


def test_both_sides_are_unique_and_copies_go():
    def pair(summary: str, code: str, package: str = "a") -> CodePair:
        return CodePair(package, "m", "n", summary, code)

    lines = [f"    value_{i} = compute({i})" for i in range(10)]
    long = "def f(a):\n" + "\n".join(lines)
    copy = "def f(b):\n" + "\n".join([*lines[:9], "    something_else = 1"])
    other = "def f(b):\n" + "\n".join([*lines[:5], *(f"    other_{i} = compute({i})" for i in range(5))])
    first = pair("One thing", long)
    kept = deduplicate(
        [first, pair("One  THING.", other), pair("Two", long.upper()), pair("Three", copy), pair("4", other)]
    )
    assert kept == [first, pair("4", other)]
    shared = [pair("Run the step", f"def f():\n    return {'x' * i}") for i in range(1, 6)]
    assert deduplicate(shared) == []
    assert deduplicate(shared[:3]) == shared[:1]


def test_packages_are_distributions(tmp_path):
    write(tmp_path, "one/m.py", function("Return what the first one is known for."))
    write(tmp_path, "_one.py", function("Return what the second one is known for."))
    write(tmp_path, "loose/m.py", function("Return what the third one is known for."))
    write(
        tmp_path,
        "Some_One-1.0.dist-info/RECORD",
        "one/m.py,,\n_one.py,,\n../../bin/x,,\nSome_One-1.0.dist-info/RECORD,,\n",
    )
    assert [(p.package, p.module) for p in harvest([tmp_path])] == [
        ("some-one", "_one"), ("loose", "loose.m"), ("some-one", "one.m")
    ]  # fmt: skip
    assert [p.module for p in harvest([tmp_path], packages=["loose"])] == ["loose.m"]


# ---------------------------------------------------------------- a slice of the standard library


@pytest.fixture(scope="module")
def slice_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("site")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for name in ("email", "json", "logging", "asyncio"):
        shutil.copytree(stdlib / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("argparse.py", "ast.py", "statistics.py", "shutil.py", "tarfile.py", "os.py"):
        shutil.copy(stdlib / name, root / name)
    return root


@pytest.fixture(scope="module")
def pairs(slice_root) -> list[CodePair]:
    return harvest([slice_root])


def test_the_same_in_every_process(slice_root, pairs):
    script = (
        "import sys, hashlib\nfrom gircse.data import installed_code as c\np = c.harvest([sys.argv[1]])\n"
        "s = c.split(p, fraction=0.1)\ne = c.evaluation_set(s.test, num_queries=20, max_documents=50)\n"
        "print(hashlib.sha256(repr((p, s, e)).encode()).hexdigest())"
    )
    # another hash seed than this process, and a locale that is not UTF-8
    environment = {**os.environ, "PYTHONHASHSEED": "1", "LC_ALL": "C", "PYTHONUTF8": "0"}
    environment["PYTHONPATH"] = str(Path(installed_code.__file__).parents[2])
    command = [sys.executable, "-c", script, str(slice_root)]
    there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    held = split(pairs, fraction=0.1)
    here = (pairs, held, evaluation_set(held.test, num_queries=20, max_documents=50))
    assert there == hashlib.sha256(repr(here).encode()).hexdigest()


def test_real_pairs_keep_what_is_promised(pairs):
    assert len(pairs) > 300
    for pair in pairs:
        assert 5 <= len(pair.summary.split()) <= 64
        assert 3 <= len(pair.code.split("\n")) <= 80
        assert pair.code.startswith(("def f(", "async def f(", "def func(", "async def func("))
        assert pair.summary not in pair.code
        compile(pair.code, "code", "exec")
    for side in ("summary", "code"):
        texts = [" ".join(getattr(pair, side).lower().split()) for pair in pairs]
        assert len(set(texts)) == len(texts)


def test_split_by_package(pairs):
    copied = [p for p in pairs if p.package == "email"][:5]
    leak = [CodePair("json", "m", "n", "A new text for it", p.code) for p in copied]
    leak += [CodePair("json", "m", "n", p.summary, f"def f({'x' * i}): 1") for i, p in enumerate(copied)]
    result = split([*leak, *pairs], test_packages=["email"])
    assert result.test_packages == ("email",)
    assert {p.package for p in result.test} == {"email"}
    assert "email" not in {p.package for p in result.train}
    assert not set(leak) & set(result.train)
    assert len(result.train) > 0.95 * (len(pairs) - len(result.test))
    automatic = split(pairs, fraction=0.1)
    assert automatic.test_packages
    assert 0 < len(automatic.test) < len(automatic.train)
    assert split(pairs, fraction=0.1, seed=1) != automatic
    for packages in (["nothing"], {p.package for p in pairs}):
        with pytest.raises(ValueError, match="test_packages: got"):
            split(pairs, test_packages=packages)
    with pytest.raises(ValueError, match="pairs: got packages of"):
        split([p for p in pairs if p.package == "email"])


def test_rows_and_evaluation_set(pairs):
    assert to_rows(pairs[:1]) == [Row(installed_code.INSTRUCTION, pairs[0].summary, (pairs[0].code,))]
    code_of = {p.summary: p.code for p in pairs}
    for queries, documents in ((500, 30), (7, 10_000)):
        data = evaluation_set(pairs, num_queries=queries, max_documents=documents, seed=3)
        assert len(data.documents) == min(documents, len(pairs))
        assert len(data.queries) == len(data.relevant) == min(queries, len(data.documents))
        for query, relevant in zip(data.queries, data.relevant, strict=True):
            assert [data.documents[i] for i in relevant] == [code_of[query]]
    assert evaluation_set(pairs, seed=1) != evaluation_set(pairs, seed=2)
    for arguments, message in (
        ((pairs, 0, 1), "num_queries: got 0"),
        ((pairs, 1, 0), "max_documents: got 0"),
        (([], 1, 1), "pairs: got none"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluation_set(arguments[0], num_queries=arguments[1], max_documents=arguments[2])
