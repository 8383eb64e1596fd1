"""`repsft selftest`: green where the laws hold, and red, law by law, where one thing is broken."""

import json
import pickle
import shutil
import subprocess

import pytest
import torch

from repsft_fast.cli import main
from repsft_fast.config import Config
from repsft_fast.data.sample import Sample
from repsft_fast.data.store import TokenStore
from repsft_fast.errors import ConfigError, ModelError
from repsft_fast.selftest import kill_and_resume, laws, passes, table
from repsft_fast.snapshot import SnapshotPool
from repsft_fast.training.build import build
from tests.helpers import runs
from tests.helpers.chat_tokenizers import byte_level


@pytest.fixture
def parts(tmp_path):
    made = build(Config.of(table.settings_of(None, tmp_path, [])))
    yield made
    torch.use_deterministic_algorithms(False)


CHECKS = {law: check for law, _, check in table.CHECKS}


@pytest.mark.parametrize("law", CHECKS)
def test_every_law_holds_on_the_built_in_model(law, parts):
    found = CHECKS[law](parts)
    assert found.holds, found.figure
    assert CHECKS[law](parts).holds, "a check leaves the parts as the next one needs them"


def leak(parts, monkeypatch):
    """Every position sees a tenth of the mean of all."""
    from repsft_fast.models import loss

    plain = loss.hidden_states
    monkeypatch.setattr(
        loss, "hidden_states", lambda *a, **k: (lambda h: h + 0.1 * h.mean(0, keepdim=True))(plain(*a, **k))
    )


def denominator_of_the_row(parts, monkeypatch):
    """The old mistake: every microbatch averages over itself."""
    plain = TokenStore.row
    monkeypatch.setattr(TokenStore, "row", lambda store, planned, **more: plain(
        store, planned, **{**more, "denominator": float(len(planned.samples))}))  # fmt: skip


def inexact_head(parts, monkeypatch):
    """A head that rounds its inputs to bf16 unasked."""
    plain = laws.linear_cross_entropy
    monkeypatch.setattr(
        laws, "linear_cross_entropy", lambda x, *more, **named: plain(x.bfloat16().float(), *more, **named)
    )


def snapshot_that_draws(parts, monkeypatch):
    plain = SnapshotPool.take

    def take(pool, name, values):
        plain(pool, name, values)
        torch.rand(1)

    monkeypatch.setattr(SnapshotPool, "take", take)


def revert_that_forgets_a_moment(parts, monkeypatch):
    plain = SnapshotPool.restore

    def restore(pool, name):
        moment = next(t for n, t in pool.live.items() if "exp_avg_sq" in n)
        before = moment.clone()
        values = plain(pool, name)
        moment.copy_(before)
        return values

    monkeypatch.setattr(SnapshotPool, "restore", restore)


def a_read_in_the_step(parts, monkeypatch):
    plain = parts.model.loss
    monkeypatch.setattr(
        parts.model, "loss", lambda row: (lambda loss, stats: (loss, stats, loss.item())[:2])(*plain(row))
    )


def a_plan_that_loses_one(parts, monkeypatch):
    from repsft_fast.data.plan import Plan

    plain = Plan.epoch
    monkeypatch.setattr(
        Plan, "epoch", lambda plan, *place, **more: plain(plan, *place, **{**more, "skip": [3]})
    )


def a_reader_of_pickles(parts, monkeypatch):
    def load(path, tensors):
        for file in path.iterdir():
            if file.read_bytes()[:2] == b"\x80\x02":
                pickle.loads(file.read_bytes())

    monkeypatch.setattr(laws, "load_checkpoint", load)


def sums_in_floating_point(parts, monkeypatch):
    from repsft_fast.stats import PositionStats, TokenStats

    def by(stats, segments, count):
        table = torch.zeros(count).index_add_(0, segments, stats.loss)
        return TokenStats(table[:, None])

    monkeypatch.setattr(PositionStats, "sum_by", by)


BREAKS = {
    1: leak, 2: denominator_of_the_row, 3: inexact_head, 4: snapshot_that_draws, 5: revert_that_forgets_a_moment,
    8: a_read_in_the_step, 9: a_plan_that_loses_one, 10: a_reader_of_pickles, 11: sums_in_floating_point,
}  # fmt: skip


def test_where_float64_finds_no_room_law_two_is_held_to_the_start_up_check(parts, monkeypatch):
    addresses = [p.data_ptr() for p in parts.model.parameters()]
    assert "in float64" in laws.split_does_not_matter(parts).figure
    assert [p.data_ptr() for p in parts.model.parameters()] == addresses
    monkeypatch.setattr(passes, "FLOAT64_PARAMETERS", 10)
    found = laws.split_does_not_matter(parts)
    assert found.holds
    assert "allowed 0.001)" in found.figure
    denominator_of_the_row(parts, monkeypatch)
    assert not laws.split_does_not_matter(parts).holds


@pytest.mark.parametrize("law", CHECKS)
def test_every_law_turns_red_when_its_subject_is_broken(law, parts, monkeypatch):
    BREAKS[law](parts, monkeypatch)
    found = CHECKS[law](parts)
    assert not found.holds, found.figure


def test_the_pickle_is_one(tmp_path):
    pickle.loads(laws.pickle_that_makes(tmp_path / "made"))
    assert (tmp_path / "made").is_dir()


class TestCrash:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        """Law 6 as it is run, once: its folder, and what it found."""
        folder = tmp_path_factory.mktemp("crash")
        found = kill_and_resume.killed_and_resumed(table.settings_of(None, folder, []), folder / "runs")
        assert found.holds, found.figure
        return folder / "runs"

    def test_the_run_was_killed_in_epoch_one_and_resumed(self, folder):
        lines = kill_and_resume._lines(folder / "killed")
        assert [line["generation"] for line in lines if line["kind"] == "resume"]
        assert len([line for line in lines if line["kind"] == "update"]) == kill_and_resume.UPDATES
        assert kill_and_resume.KILL_AFTER % table.UPDATES_PER_EPOCH not in (
            0,
            kill_and_resume.UPDATES % table.UPDATES_PER_EPOCH,
        )

    def test_another_figure_or_another_bit_is_seen(self, folder, tmp_path):
        for name, change in {"metrics.jsonl": _other_loss, "model.safetensors": _flip_last_byte}.items():
            copy = shutil.copytree(folder / "killed", tmp_path / name)
            assert kill_and_resume.compared(folder / "whole", copy).holds
            (copy / name).write_bytes(change((copy / name).read_bytes()))
            assert not kill_and_resume.compared(folder / "whole", copy).holds

    @pytest.mark.parametrize(
        ("codes", "says"),
        [
            ((0,), "the run to be killed ended with 0"),
            ((1,), "ended with 1"),
            ((-9, 0), "the kill did not come"),
        ],
    )
    def test_a_kill_that_did_not_land_proves_nothing(self, codes, says, tmp_path, monkeypatch):
        answers = iter(codes)
        monkeypatch.setattr(
            kill_and_resume,
            "_run",
            lambda arguments: subprocess.CompletedProcess([], next(answers), "", "why"),
        )
        found = kill_and_resume.killed_and_resumed({}, tmp_path)
        assert not found.holds
        assert says in found.figure


def _other_loss(data):
    lines = [json.loads(line) for line in data.decode().splitlines()]
    last = next(line for line in reversed(lines) if line["kind"] == "update")
    last["loss"] += 1e-9
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def _flip_last_byte(data):
    return data[:-1] + bytes([data[-1] ^ 1])


class TestCommand:
    @pytest.fixture(autouse=True)
    def without_a_crash(self, monkeypatch):
        """Law 6 takes two processes; `TestCrash` runs it."""
        monkeypatch.setattr(
            kill_and_resume, "killed_and_resumed", lambda settings, folder: laws.Found("stands in", True)
        )
        yield
        torch.use_deterministic_algorithms(False)

    def test_the_table_is_green(self, capsys):
        assert main(["selftest"]) == 0
        printed = capsys.readouterr().out
        assert printed.count("✓") == 10
        drawn = table._drawn()
        sizes = (
            f"{sum(s.positions for s in drawn)} positions, {sum(map(sum, (s.trained for s in drawn)))}"
            " trained"
        )
        assert f"Checked on 16 generated samples: {sizes}, at most 32 a sample." in " ".join(printed.split())
        assert "All 10 checked laws hold here." in printed
        assert "✗" not in printed

    def test_a_user_s_model_and_data_and_a_law_that_breaks(self, tmp_path, capsys, monkeypatch):
        settings = runs.settings(
            tmp_path, samples=5, tasks=2, optim__name="sgd", loss__skip_below=0.01, model__lora={"rank": 2}
        )
        file = tmp_path / "run.yaml"
        file.write_text(json.dumps(settings))
        assert main(["selftest", "--config", str(file)]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert "LlamaForCausalLM" in printed
        assert "16 samples from the first 64 rows of each source, 5 of them different:" in printed
        assert "loss.skip_below is 0 here" in printed
        assert not (tmp_path / "run").exists(), "the run's own folder is left alone"
        broken = (8, "broken", lambda parts: 1 / 0)
        monkeypatch.setattr(table, "CHECKS", (*table.CHECKS[6:], broken))
        assert main(["selftest", "--config", str(file)]) == 1
        printed = capsys.readouterr().out
        assert "ZeroDivisionError:" in printed
        assert "Broken here: law 8." in printed

    def test_a_law_that_cannot_be_checked_says_why_and_is_not_green(self, capsys, monkeypatch):
        def skip(parts):
            raise laws.Skipped("no room here")

        monkeypatch.setattr(table, "CHECKS", ((4, "snapshots", skip),))
        assert main(["selftest"]) == 0
        printed = capsys.readouterr().out
        assert "no room here" in printed
        assert "All 1 checked laws hold here." in printed
        assert "Not checked: law 4" in printed

    def test_a_model_that_leaks_at_start_is_law_one(self, capsys, monkeypatch):
        def build(config, **more):
            raise ModelError("model.attention: a packed document changes with its neighbours")

        monkeypatch.setattr(table, "build", build)
        assert main(["selftest"]) == 1
        assert "Broken here: law 1." in capsys.readouterr().out

    def test_a_state_too_large_to_write_again_and_again_is_said(self, tmp_path):
        notes = []
        own = {"model": {"path": "large"}}
        assert table._small_enough(own, 1 << 20, tmp_path, notes) is own
        assert notes == []
        small = table._small_enough(own, 1 << 34, tmp_path, notes)
        assert small["model"] == {"config": table.MODEL}
        assert "built-in model: writing 16.0 GiB" in notes[0]

    def test_under_torchrun_it_is_refused(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ConfigError, match="one process"):
            table.selftest()


def test_the_tokenizer_is_read_once_and_stays_the_same(tmp_path, monkeypatch):
    (tmp_path / "user").mkdir()
    settings = runs.settings(tmp_path / "user", samples=5)
    tokenizer = byte_level()
    tokenizer.save_pretrained(tmp_path / "user" / "tokenizer")
    settings["tokenizer"] = {"path": str(tmp_path / "user" / "tokenizer")}
    made = table.settings_of(Config.of(settings), tmp_path, [])
    shutil.rmtree(tmp_path / "user" / "tokenizer")
    again = table.build_tokenizer(Config.of(made))
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template == tokenizer.chat_template


def test_gradients_of_one_cut_are_not_those_of_the_next(parts):
    """They are adopted, not copied: what is kept must not be written to by the backward pass after it."""
    update = passes.next_updates(parts, 1)[0]
    first = passes.gradients_of(parts, update, [list(update.samples)])
    before = {name: g.clone() for name, g in first.items()}
    passes.gradients_of(parts, update, [list(update.samples)[:1]])
    assert all(torch.equal(first[name], g) for name, g in before.items())


@pytest.mark.parametrize(("length", "first"), [(100, 70), (100, 2), (100, 99), (10, 5)])
def test_a_shortened_sample_keeps_what_is_trained_first(length, first):
    sample = Sample(list(range(length)), [n >= first for n in range(length)])
    short = table.shortened(sample, 16)
    assert short.positions == min(16, sample.positions)
    assert first in [token for token, trained in zip(short.ids, short.trained, strict=True) if trained]
    assert short.ids == sample.ids[short.ids[0] : short.ids[0] + len(short.ids)]
