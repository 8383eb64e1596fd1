"""What a forked process finds done: else each pays seconds again, and nothing says so."""

import gc
import sys
from pathlib import Path

from tests.helpers import run_jobs, runs, sketches
from tests.helpers.ranks import run_ranks

NEEDED = {
    "pytest", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama", "peft.tuners.lora",
    "matplotlib.figure",
}  # fmt: skip


def found(world=None):
    """(imports that were left to it, whether what it began with is out of the collector's sight, and whether
    it sketches)."""
    needed = NEEDED | {"repsft_fast.training.trainer"}
    sketched = sketches.picture.save is sketches.save
    return sorted(needed - set(sys.modules)), gc.get_freeze_count() > 100_000, sketched


def test_a_rank_has_everything_imported_and_sketches():
    assert run_ranks(found) == [([], True, True)] * 2


def test_a_run_imports_next_to_nothing_on_its_way(server, tmp_path):
    """matplotlib.figure alone is a quarter of a second, and half of a small run."""
    left = server.run("tests.helpers.test_forked:imported_by_a_run", {"folder": str(tmp_path)})
    assert len(left.result) < 10, left.result


def imported_by_a_run(folder):
    before = set(sys.modules)
    run_jobs.train(runs.settings(Path(folder), budget__epochs=1))
    return sorted(set(sys.modules) - before)


def test_a_run_of_the_server_has_everything_imported_and_sketches(server):
    seen = server.run("tests.helpers.test_forked:found_by_a_run", {})
    assert seen.result == [[], True, True], seen.output


def found_by_a_run():
    missing, *others = found()
    missing += sorted({"matplotlib.backends.backend_agg", "tests.helpers.spike_jobs"} - set(sys.modules))
    # jobs are no tests: they need no pytest
    return [name for name in missing if name != "pytest"], *others
