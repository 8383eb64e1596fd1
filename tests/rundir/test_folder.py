"""The run's folder: what it records of what it made, how a model is moved in, what a start that came to
nothing leaves."""

import fcntl
import json
import os
import random
import shutil

import pytest

from repsft_fast import checkpoint
from repsft_fast.config import Config
from repsft_fast.errors import ConfigError, DataError, RepsftError, TrainingError
from repsft_fast.rundir import made, publish
from repsft_fast.rundir.fingerprints import PIECE, PIECES, Fingerprint
from repsft_fast.rundir.folder import HoldsARun, RunFolder
from repsft_fast.rundir.made import Made
from repsft_fast.training.trainer import train
from tests.helpers import runs

BIG = PIECE * PIECES


def names(folder):
    return sorted(os.listdir(folder))


def write(folder, **files):
    """Files whose names have __ for the dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
    return folder


def published(folder, into=None, **files):
    publish.publish(write(publish.stage(folder), **files), into or folder)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


class TestPrints:
    @pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, BIG, BIG + 1, 3 * BIG + 12_345])
    def test_a_file_is_told_from_others(self, size, tmp_path):
        content = random.Random(size).randbytes(size)
        file = tmp_path / "x"
        file.write_bytes(content)
        print_ = Fingerprint.of(file)
        assert print_.tells(file) == "same"
        assert len(print_.pieces) <= PIECES
        for at in {0, size // 2, size - 1} if size <= BIG else {0, size - 1}:
            if not size:
                break
            file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            assert print_.tells(file) == "other"
        file.write_bytes(content + b"x")
        assert print_.tells(file) == "other"

    def test_the_beginning_of_it_is_what_a_full_disk_leaves(self, tmp_path):
        content = random.Random(0).randbytes(3 * 65_536)
        file = tmp_path / "x"
        file.write_bytes(content)
        print_ = Fingerprint.of(file)
        for cut, told in (
            (0, "cut"),
            (100, "other"),
            (65_536, "cut"),
            (3 * 65_536 - 1, "cut"),
        ):  # of too little nothing is known
            file.write_bytes(content[:cut])
            assert print_.tells(file) == told
        file.write_bytes(content[1:])
        assert print_.tells(file) == "other"

    def test_only_a_plain_file_is_opened(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        write(tmp_path, x="x")
        (tmp_path / "link").symlink_to("x")
        for name in ("pipe", "link", "."):
            with pytest.raises(OSError, match=r"plain file|symbolic"):
                Fingerprint.of(tmp_path / name)


class TestClaims:
    def test_a_claimed_name_is_the_runs_for_ever(self, folder):
        made.claim(folder, ["run.png"])
        write(folder, run__png="drawn")
        made.claim(folder, ["run.png", "timeline.json"])
        assert Made.read(folder).names == {"run.png", "timeline.json"}

    def test_what_is_there_before_is_not(self, folder):
        write(folder, run__png="somebody's")
        with pytest.raises(ConfigError, match=r"did not make: run\.png; move it away"):
            made.claim(folder, ["metrics.jsonl", "run.png"])
        assert Made.read(folder) is None

    @pytest.mark.parametrize("name", ["run.png", "checkpoints"])
    def test_a_link_at_a_claimed_name_is_not(self, name, folder, tmp_path):
        made.claim(folder, [name])
        (folder / name).symlink_to(tmp_path)
        with pytest.raises(ConfigError, match=rf"{name} \(a link\)"):
            made.claim(folder, [name])


class TestPublishing:
    def test_another_number_of_shards_leaves_none_behind(self, folder):
        published(folder, config__json="1", model_1__safetensors="a", model_2__safetensors="b")
        published(folder, config__json="2", model__safetensors="c")
        assert names(folder) == [made.FILE, "config.json", "model.safetensors"]
        assert made.whole(folder) is None

    def test_folders_inside(self, folder):
        staged = write(publish.stage(folder), config__json="1")
        write(staged / "additional_chat_templates", tools__jinja="{{ x }}")
        publish.publish(staged, folder)
        published(folder, folder / "adapter", adapter_config__json="1")
        assert made.whole(folder) is None
        (folder / "additional_chat_templates" / "tools.jinja").write_text("edited")
        assert made.whole(folder) == "additional_chat_templates/tools.jinja is not as it was written"
        with pytest.raises(TrainingError, match="additional_chat_templates"):
            published(folder, config__json="2")
        assert (folder / "adapter" / "adapter_config.json").exists()

    @pytest.mark.parametrize(
        "theirs", ["model.safetensors", "model_2.safetensors", "adapter_config.json", "config.json"]
    )
    def test_what_is_not_the_runs_is_refused_before_the_first_move(self, theirs, folder):
        published(folder, config__json="1", model__safetensors="a", model_2__safetensors="b")
        (folder / theirs).write_text("somebody's")
        before = {name: (folder / name).read_bytes() for name in names(folder) if name != made.FILE}
        with pytest.raises(
            TrainingError, match=rf"{theirs}.*; move them away, then `repsft export {folder}`"
        ):
            published(folder, config__json="2", model__safetensors="c")
        assert {name: (folder / name).read_bytes() for name in before} == before

    def test_what_is_looked_for_first_comes_last(self, folder, monkeypatch):
        moved, real = [], os.replace
        monkeypatch.setattr(os, "replace", lambda source, to: (moved.append(to.name), real(source, to))[1])
        published(
            folder, config__json="1", z__safetensors="a", tokenizer__json="t", generation_config__json="g"
        )
        moved = [name for name in moved if name != made.FILE]
        assert moved == ["z.safetensors", "generation_config.json", "tokenizer.json", "config.json"]

    @pytest.mark.parametrize("place", [".", "adapter"])
    def test_never_through_a_link(self, place, folder, tmp_path):
        outside = write(tmp_path / "outside", config__json="theirs")
        if place == "adapter":
            (folder / place).symlink_to(outside)
        else:
            (folder / "config.json").symlink_to(outside / "config.json")
        with pytest.raises(TrainingError, match="a link"):
            published(folder, folder / place, config__json="2")
        assert (names(outside), (outside / "config.json").read_text()) == (["config.json"], "theirs")

    def test_the_runs_folder_may_itself_be_a_link(self, tmp_path):
        (tmp_path / "scratch").mkdir()
        (tmp_path / "run").symlink_to("scratch")
        published(tmp_path / "run", config__json="1")
        published(tmp_path / "run", tmp_path / "run" / "adapter", adapter_config__json="1")
        assert made.whole(tmp_path / "scratch") is None

    def test_a_kill_at_any_point_is_completed_and_leaves_nothing_readable(self, folder, tmp_path):
        """After each point: no config.json beside weights that are not its own, and the next publish makes
        all whole."""
        points = []
        checkpoint.set_crash_hook(points.append)
        try:
            published(folder, config__json="1", a__safetensors="old a", b__safetensors="old b")
        finally:
            checkpoint.set_crash_hook(None)
        assert sum(point.startswith("publish") for point in points) == 4
        for kill in range(len(points)):
            again = tmp_path / f"run{kill}"
            shutil.copytree(folder, again)
            passed = 0

            def die(point, kill=kill):
                nonlocal passed
                passed += 1
                if passed == kill + 1:
                    raise KeyboardInterrupt

            staged = write(
                publish.stage(again), config__json="2", a__safetensors="new a", c__safetensors="new c"
            )
            checkpoint.set_crash_hook(die)
            try:
                publish.publish(staged, again)
            except KeyboardInterrupt:
                pass
            finally:
                checkpoint.set_crash_hook(None)
            weights = [
                (again / f"{name}.safetensors") for name in "abc" if (again / f"{name}.safetensors").exists()
            ]
            contents = {path.read_text() for path in weights}
            if (again / "config.json").exists():
                new = (again / "config.json").read_text() == "2"
                assert contents == ({"new a", "new c"} if new else {"old a", "old b"})
            else:
                assert "moved in only in part" in made.whole(again)
            published(again, config__json="2", a__safetensors="new a", c__safetensors="new c")
            assert made.whole(again) is None
            assert names(again) == [made.FILE, "a.safetensors", "c.safetensors", "config.json"]

    def test_a_disk_that_fails_is_told_with_the_way_out(self, folder, monkeypatch):
        staged = write(publish.stage(folder), config__json="1")

        def fail(*paths):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(
            TrainingError, match=rf"got No space left on device; mend that, then `repsft export {folder}`"
        ):
            publish.publish(staged, folder)

    def test_staged_folders_that_a_kill_left_go_with_the_next_one(self, folder):
        write(folder / f"{made.STAGED}of-somebody", x="x")
        first = write(publish.stage(folder), x="x")
        second = publish.stage(folder)
        assert not first.exists()
        assert second.exists()
        assert (folder / f"{made.STAGED}of-somebody" / "x").exists()

    def test_what_is_missing_or_damaged_is_named(self, folder):
        assert made.whole(folder) == "no model was written"
        published(folder, folder / "adapter", adapter_config__json="1")
        assert made.whole(folder) == "no model was written"
        published(folder, config__json="1", model__safetensors="a", a__json="1", b__json="2", c__json="3")
        (folder / "model.safetensors").write_text("b")
        assert made.whole(folder) == "model.safetensors is not as it was written"
        for name in ("a.json", "b.json", "c.json", "adapter/adapter_config.json"):
            (folder / name).unlink()
        assert made.whole(folder) == "a.json is missing; b.json is missing; c.json is missing; and 2 more"


def failing(config, begin, error=None):
    """A start that fails once `begin` was done in its folder."""
    with RunFolder(config) as folder:
        begin(folder.folder)
        raise error or RuntimeError


class TestAStartThatCameToNothing:
    @pytest.mark.parametrize("error", [DataError("x"), KeyboardInterrupt()])
    def test_a_new_folder_is_gone_with_those_above_it(self, error, tmp_path):
        config, seen = (
            Config.of(runs.settings(tmp_path), {"run.folder": str(tmp_path / "new" / "deep" / "run")}),
            [],
        )
        with pytest.raises(type(error)):
            failing(config, lambda folder: seen.extend(names(folder)), error)
        assert seen == [".lock", made.FILE, "run.yaml"]
        assert not (tmp_path / "new").exists()

    def test_a_folder_that_was_there_is_as_it_was(self, tmp_path):
        folder = write(tmp_path / "run", slurm__out="log")
        settings = runs.settings(tmp_path, budget__updates=1)
        with pytest.raises(DataError):
            train({**settings, "data": {**settings["data"], "max_tokens": 3}})
        assert names(folder) == ["slurm.out"]
        assert train(settings).updates == 1

    def test_also_where_what_follows_the_build_fails(self, tmp_path):
        """The reporter opens metrics.jsonl and trackers their folders before anything was computed."""
        settings = runs.settings(tmp_path, log__trackers=["tensorboard"])
        folder = tmp_path / "run"

        def begin(folder):
            write(folder, metrics__jsonl="")
            write(folder / "tensorboard", events="x")
            write(folder / "theirs", x="x")

        with pytest.raises(RuntimeError):
            failing(Config.of(settings), begin)
        assert [str(path.relative_to(folder)) for path in folder.rglob("*")] == ["theirs", "theirs/x"]

    def test_a_run_that_began_keeps_what_it_has(self, tmp_path):
        with pytest.raises(RuntimeError):
            failing(Config.of(runs.settings(tmp_path)), lambda folder: write(folder, metrics__jsonl="{}\n"))
        assert names(tmp_path / "run") == [".lock", made.FILE, "metrics.jsonl", "run.yaml"]

    def test_a_disk_that_is_full_leaves_nothing(self, tmp_path, monkeypatch):
        def fail(*arguments):
            raise OSError(28, "No space left on device")

        config = Config.of(runs.settings(tmp_path))
        with monkeypatch.context() as patched:
            patched.setattr("repsft_fast.rundir.folder.replace_file", fail)
            with (
                pytest.raises(TrainingError, match=r"run.yaml: cannot be written, got No space left"),
                RunFolder(config),
            ):
                pass
        assert not (tmp_path / "run").exists()
        with RunFolder(config):
            pass

    def test_what_was_killed_before_its_settings_stood_is_begun_anew(self, tmp_path):
        config = Config.of(runs.settings(tmp_path))
        with RunFolder(config):
            (tmp_path / "run" / "run.yaml").unlink()
        assert names(tmp_path / "run") == [".lock", made.FILE]
        with RunFolder(config) as folder:
            assert folder.others == []


class TestResuming:
    def test_settings_are_written_when_they_are_accepted(self, tmp_path):
        settings = runs.settings(tmp_path)
        with RunFolder(Config.of(settings)):
            pass
        before = {name: (tmp_path / "run" / name).read_bytes() for name in ("run.yaml", made.FILE)}
        other = Config.of(settings, {"optim.lr": 0.5, "log.trackers": ["tensorboard"]})
        with pytest.raises(RepsftError), RunFolder(other, resume=True):
            raise RepsftError("foreign")
        assert {name: (tmp_path / "run" / name).read_bytes() for name in before} == before
        with RunFolder(other, resume=True) as folder:
            folder.accepted(other)
        assert Config.of(tmp_path / "run" / "run.yaml").optim.lr == 0.5
        assert "tensorboard" in Made.read(tmp_path / "run").names

    def test_hard_links_to_a_copy_are_parted(self, tmp_path):
        """`cp -al` is a common way to keep a folder as it is."""
        config = Config.of(runs.settings(tmp_path))
        with RunFolder(config):
            write(tmp_path / "run", metrics__jsonl="{}\n")
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "run", copy, copy_function=os.link)
        before = {name: (copy / name).read_bytes() for name in names(copy)}
        (copy / ".lock").write_bytes(b'{"pid": 1}')
        before[".lock"] = b'{"pid": 1}'
        with (
            RunFolder(config, resume=True) as folder,
            RunFolder(Config.of(config, {"run.folder": str(copy)}), resume=True),
        ):
            # as the reporter does, before the checkpoint is read
            with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
                folder.accepted(config)
                file.write("more\n")
            assert (tmp_path / "run" / "metrics.jsonl").read_text() == "{}\nmore\n"
            assert {name: (copy / name).read_bytes() for name in before if name != ".lock"} == {
                name: content for name, content in before.items() if name != ".lock"
            }

    def test_a_moved_and_a_copied_folder_keep_their_record(self, tmp_path):
        config = Config.of(runs.settings(tmp_path))
        with RunFolder(config):
            pass
        published(tmp_path / "run", config__json="1")
        for how in (shutil.copytree, shutil.move):
            how(tmp_path / "run", tmp_path / how.__name__)
            with RunFolder(Config.of(config, {"run.folder": str(tmp_path / how.__name__)}), resume=True):
                assert made.whole(tmp_path / how.__name__) is None


class TestFoldersOfBeforeThereWereRecords:
    @pytest.fixture(scope="class")
    def ended(self, tmp_path_factory):
        settings = runs.settings(
            tmp_path_factory.mktemp("ended"), budget__updates=1, stop__token_accuracy=None
        )
        train(settings)
        return Config.of(settings)

    @pytest.fixture
    def old(self, ended, tmp_path):
        shutil.copytree(ended.run.folder, tmp_path / "run")
        (tmp_path / "run" / made.FILE).unlink()
        return Config.of(ended, {"run.folder": str(tmp_path / "run")}), tmp_path / "run"

    def test_one_that_ended_well_has_its_model(self, old):
        config, folder = old
        with RunFolder(config, resume=True) as found:
            assert found.others == []
        assert made.whole(folder) is None
        (folder / "config.json").write_text("{}")
        with (
            pytest.raises(ConfigError, match=r"config.json \(not as the run wrote it\)"),
            RunFolder(config, resume=True),
        ):
            pass

    def test_one_that_did_not_end_has_none(self, old):
        config, folder = old
        (folder / "result.json").unlink()
        with (
            pytest.raises(ConfigError, match=r"did not make: config.json, .*model.safetensors"),
            RunFolder(config, resume=True),
        ):
            pass
        for name in ("config.json", "generation_config.json", "model.safetensors"):
            (folder / name).unlink()
        with RunFolder(config, resume=True) as found:
            assert found.others == []

    def test_a_model_moved_in_first_makes_the_record_whole(self, old):
        """As an export into such a folder does."""
        config, folder = old
        (folder / "model.safetensors").unlink()
        published(folder, config__json="2", model__safetensors="new")
        assert made.whole(folder) is None
        with RunFolder(config, resume=True) as found:
            assert found.others == []

    def test_a_record_of_less_than_a_run_is_completed(self, old):
        config, folder = old
        Made(folder, {"something"}).write()
        with RunFolder(config, resume=True):
            assert {"something", "run.yaml", "metrics.jsonl"} <= Made.read(folder).names
            assert made.whole(folder) is None

    @pytest.mark.parametrize(
        "damage", ["settings: of another program\n", "", "\0", "run: {folder: x}\ndata: 3\n", None]
    )
    def test_somebody_elses_run_yaml(self, damage, old):
        config, folder = old
        (folder / "run.yaml").unlink() if damage is None else (folder / "run.yaml").write_text(damage)
        before = names(folder)
        with (
            pytest.raises(ConfigError, match=r"its run\.yaml is not a run's settings"),
            RunFolder(config, resume=True),
        ):
            pass
        assert names(folder) == before

    def test_an_older_versions_settings_are_settings(self, old):
        config, folder = old
        text = (folder / "run.yaml").read_text()
        (folder / "run.yaml").write_text(text + "gone: {setting: 1}\n")
        with RunFolder(config, resume=True):
            pass


def test_custom_code_is_a_name_that_is_written(tmp_path):
    write(tmp_path / "base", config__json="{}", modeling_own__py="x")
    write(tmp_path / "run", modeling_own__py="somebody's", other__py="somebody's")
    settings = runs.settings(tmp_path)
    settings["model"] = {"path": str(tmp_path / "base")}
    with RunFolder(Config.of(settings)) as folder:
        assert folder.others == ["left alone, for the run did not make them: modeling_own.py, other.py"]
    shutil.rmtree(tmp_path / "run")
    write(tmp_path / "run", modeling_own__py="somebody's", other__py="somebody's")
    settings["model"]["trust_remote_code"] = True
    with (
        pytest.raises(ConfigError, match=r"did not make: modeling_own\.py, expected"),
        RunFolder(Config.of(settings)),
    ):
        pass


def test_names_that_differ_in_case_where_the_file_system_does_not_tell_them_apart(folder, monkeypatch):
    """As it looks there: another spelling is listed, and both lead to the file."""
    write(folder, config__json="somebody's")
    listed = os.listdir
    monkeypatch.setattr(
        os, "listdir", lambda path: [name.replace("config.json", "Config.JSON") for name in listed(path)]
    )
    assert Made(folder).not_our_model(".") == {"config.json": ""}


def test_the_record_is_json_that_anyone_can_read(folder):
    published(folder, config__json="1")
    found = json.loads((folder / made.FILE).read_text())
    assert found["version"] == 1
    assert found["models"]["."]["config.json"][0][0] == 1


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def refuse(fd, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with RunFolder(Config.of(runs.settings(tmp_path))) as folder:
        assert len(folder.others) == 1
        assert "has no locks (Function not implemented); do not start two runs in it" in folder.others[0]


def test_a_run_that_can_be_gone_on_with_is_an_error_of_its_own(tmp_path):
    """The demo, which has no --resume, gives other advice for it; for anything else in a folder it does not."""
    settings = runs.settings(tmp_path, checkpoint__every_updates=2, budget__updates=2)
    train(settings)
    with pytest.raises(HoldsARun, match="--resume"):
        train(settings)
    other = tmp_path / "other"
    other.mkdir()
    (other / "run.yaml").write_text("somebody's")
    with pytest.raises(ConfigError) as told:
        train({**settings, "run": {**settings["run"], "folder": str(other)}})
    assert not isinstance(told.value, HoldsARun)
