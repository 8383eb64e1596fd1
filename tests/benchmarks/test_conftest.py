"""pytest-benchmark's silences are closed: each is run as a user would run it."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from benchmarks.conftest import session_problems
from benchmarks.harness import checkout

SUITE = "def test_a(benchmark):\n    benchmark.pedantic(lambda: sum(range(1000)), rounds=3)\n"


@pytest.fixture
def suite(tmp_path):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for name in ("__init__.py", "conftest.py"):
        shutil.copy(checkout.ROOT / "benchmarks" / name, folder / name)
    shutil.copytree(checkout.ROOT / "benchmarks" / "harness", folder / "harness")
    (folder / "test_x_bench.py").write_text(SUITE)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks", *arguments]
        storage = f"--benchmark-storage=file://{tmp_path}/saved"
        # Not a worker of the session around it: pytest-benchmark stays silent in those.
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        return subprocess.run(
            [*command, storage],
            cwd=tmp_path,
            env=clean,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    run.folder = tmp_path
    return run


def test_new_vanished_and_foreign_benchmarks_fail_the_session(suite):
    saved = suite("--benchmark-save=base")
    assert saved.returncode == 0, saved.stdout + saved.stderr
    path = next((suite.folder / "saved").rglob("*base.json"))
    content = json.loads(path.read_text())
    assert set(content["machine_info"]) == {"node_class", "processor_model", "cpus", "torch"}  # no host name
    (suite.folder / "benchmarks" / "test_x_bench.py").write_text(SUITE.replace("test_a", "test_b"))
    renamed = suite("--benchmark-compare")
    assert renamed.returncode != 0
    assert "test_a: vanished" in renamed.stderr
    assert "test_b: is new" in renamed.stderr

    content["machine_info"]["processor_model"] = "another"
    path.write_text(json.dumps(content))
    foreign = suite("--benchmark-compare")
    assert foreign.returncode != 0
    assert "another kind of machine" in foreign.stdout + foreign.stderr


def test_a_session_without_benchmarks_fails(suite):
    (suite.folder / "benchmarks" / "test_x_bench.py").write_text("def test_plain():\n    pass\n")
    done = suite()
    assert done.returncode != 0
    assert "none ran" in done.stderr


@pytest.mark.parametrize("median", [0.0, float("nan"), -1.0, None])
def test_a_baseline_that_holds_no_time_is_named(median):
    ran = [{"fullname": "a", "median": 1.0}]
    assert any(
        "holds no time" in p for p in session_problems(ran, [("base", {"a": {"stats": {"median": median}}})])
    )
    assert session_problems(ran, [("base", {"a": {"stats": {"median": 1.0}}})]) == []
    assert session_problems([{"fullname": "a", "median": median}], []) != []
