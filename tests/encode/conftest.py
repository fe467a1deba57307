from __future__ import annotations

import json

import pytest

from tests.encode.sharded_runs import texts_of


@pytest.fixture
def make_input(tmp_path):
    def make(n: int, name: str = "in.txt") -> str:
        path = tmp_path / name
        lines = [json.dumps({"text": t}) if name.endswith("l") else t for t in texts_of(n)]
        path.write_text("".join(line + "\n" for line in lines))
        return str(path)

    return make
