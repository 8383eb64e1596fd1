"""Two ranks that --resume a run which has ended: told, made whole, extended or refused alike on both."""

from tests.helpers import runs
from tests.rundir.test_ended import contents, with_changes
from tests.training.test_trainer_ranks import start

OPEN = {"stop__token_accuracy": None, "optim__warmup_updates": 1, "model__lora": {"rank": 2, "dropout": 0.1}}


def ended(server, settings, ranks=2, codes=0, **every):
    outcomes = [child.wait(90) for child in start(server, settings, ranks, every=every)]
    assert [outcome.exit_code for outcome in outcomes] == [codes] * ranks, (
        outcomes[0].output + outcomes[-1].output
    )
    return outcomes


def refused(server, settings):
    """What each rank of a resumption that raises says."""
    outcomes = [child.wait(90) for child in start(server, settings, every={"resume": True})]
    assert all(outcome.result is None and outcome.exit_code for outcome in outcomes), outcomes[0].output
    return [outcome.output for outcome in outcomes]


def test_two_ranks_and_a_run_that_has_ended(server, tmp_path):
    given, run = runs.settings(tmp_path, **OPEN, budget__epochs=2), tmp_path / "run"
    ended(server, given)
    before = contents(run)

    first, other = ended(server, given, resume=True)
    assert "has ended" in first.output
    assert "has ended" not in other.output
    said = refused(server, with_changes(given, optim__lr=0.3))
    assert all("optim.lr: 0.3 (it had 0.01)" in words for words in said)
    said = refused(server, with_changes(given, budget__epochs=1))
    assert all("smaller than the one the run has" in words for words in said)
    assert contents(run) == before

    (run / "adapter_model.safetensors").unlink()
    ended(server, given, resume=True)
    assert contents(run)["adapter_model.safetensors"] == before["adapter_model.safetensors"]

    whole = runs.settings(tmp_path / "whole", **OPEN, budget__epochs=4)
    expected = ended(server, whole)[0].result
    found = ended(server, with_changes(given, budget__epochs=4), resume=True)[0].result
    assert found == expected
    after, model = contents(run), "adapter_model.safetensors"
    assert after[model] == contents(tmp_path / "whole" / "run")[model] != before[model]

    assert ended(server, with_changes(given, budget__epochs=6), 1, resume=True)[0].result["updates"] == 36
