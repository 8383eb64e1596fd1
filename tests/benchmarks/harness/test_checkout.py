"""A record says which code was measured."""

import pytest

from benchmarks import gpu_records
from benchmarks.harness import checkout, machine, records

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class TestCommit:
    """A record says which code was measured."""

    def test_neither_git_nor_a_given_commit_is_refused(self, monkeypatch, capsys):
        monkeypatch.setattr(checkout, "_git", lambda *_: "")
        monkeypatch.delenv("COMMIT", raising=False)
        with pytest.raises(checkout.NoCommit, match="COMMIT"):
            checkout.code()
        assert gpu_records.main(["--rehearse"]) == 2
        assert "no git history" in capsys.readouterr().err

    def test_a_given_commit_stands_in_a_copied_tree_and_nobody_claims_it_is_clean(self, monkeypatch):
        monkeypatch.setattr(checkout, "_git", lambda *_: "")
        monkeypatch.setenv("COMMIT", COMMIT)
        assert checkout.code() == {"commit": COMMIT, "dirty": None, "source": checkout.source_digest()}

    @pytest.mark.parametrize("given", ["", "main", COMMIT[:39], COMMIT.replace("a", "g")])
    def test_what_is_no_commit_is_refused_in_a_record_and_from_outside(self, given, monkeypatch):
        record = machine.environment("cpu") | {"commit": given}
        with pytest.raises(records.BadRecord, match="commit"):
            records.make(
                record, op="x", implementation="y", shape={}, dtype="f", times_ms=[1.0], peak_bytes=0
            )
        monkeypatch.setattr(checkout, "_git", lambda *_: "")
        monkeypatch.setenv("COMMIT", given)
        with pytest.raises(checkout.NoCommit):
            checkout.code()

    def test_two_different_answers_are_refused(self, monkeypatch):
        monkeypatch.setattr(checkout, "_git", lambda *words: "f" * 40 if words[0] == "rev-parse" else "")
        monkeypatch.setenv("COMMIT", COMMIT)
        with pytest.raises(checkout.NoCommit, match="this checkout is at"):
            checkout.code()

    def test_the_source_digest_is_of_names_and_contents(self, tmp_path):
        (tmp_path / "benchmarks").mkdir()
        (tmp_path / "benchmarks" / "a.py").write_text("1")
        first = checkout.source_digest(tmp_path)
        (tmp_path / "benchmarks" / "a.py").rename(tmp_path / "benchmarks" / "b.py")
        second = checkout.source_digest(tmp_path)
        (tmp_path / "benchmarks" / "b.py").write_text("2")
        assert len({first, second, checkout.source_digest(tmp_path)}) == 3
