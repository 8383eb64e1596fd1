"""What a forked process finds done: else each pays seconds again, and nothing says so."""

import gc
import sys

from tests.helpers import sketches
from tests.helpers.ranks import run_ranks

NEEDED = {"pytest", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama", "peft.tuners.lora"}


def found(world=None):
    """(imports that were left to it, whether what it began with is out of the collector's sight)."""
    needed = NEEDED | {"repsft_fast.training.trainer"}
    return sorted(needed - set(sys.modules)), gc.get_freeze_count() > 100_000


def test_a_rank_has_everything_imported():
    assert run_ranks(found) == [([], True)] * 2


def test_a_run_of_the_server_has_everything_imported_and_sketches(server):
    seen = server.run("tests.helpers.test_forked:found_by_a_run", {})
    assert seen.result == [[], True, True], seen.output


def found_by_a_run():
    missing, frozen = found()
    missing += sorted({"matplotlib.backends.backend_agg", "tests.helpers.spike_jobs"} - set(sys.modules))
    # jobs are no tests: they need no pytest
    return [name for name in missing if name != "pytest"], frozen, sketches.picture.save is sketches.save
