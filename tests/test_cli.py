"""The command line: what it hands on, what it refuses, what it prints and with which code it ends."""

import os
import resource
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from repsft_fast import cli
from repsft_fast.commands import bench, doctor
from repsft_fast.config import Config, setting_names
from repsft_fast.config.reference import settings, settings_page
from repsft_fast.errors import DataError, TrainingError

ROOT = Path(__file__).resolve().parents[1]
LEAST = ["--run.folder", "r", "--model.path", "m", "--data.train", "a.jsonl", "--budget.epochs", "3"]


@pytest.fixture
def trainer(monkeypatch):
    """Notes what it is called with, in the place of the real trainer and the real small verbs (which need
    torch)."""
    fake = types.ModuleType("every command")
    fake.calls, fake.answer = [], None

    def noting(verb):
        def call(*arguments, **named):
            fake.calls.append((verb, arguments, named))
            if isinstance(fake.answer, BaseException):
                raise fake.answer
            return fake.answer

        return call

    for verb in ("train", "dry_run", "inspect", "demo", "export"):
        setattr(fake, verb, noting(verb))
    for name in (
        "training.trainer",
        "sizing.dry_run",
        "commands.inspect",
        "commands.demo",
        "commands.export",
    ):
        monkeypatch.setitem(sys.modules, f"repsft_fast.{name}", fake)
    monkeypatch.setattr(doctor, "doctor", noting("doctor"))
    # `from package import module` asks the package first, which has it after any earlier import.
    monkeypatch.setattr("repsft_fast.training.trainer", fake, raising=False)
    monkeypatch.setattr("repsft_fast.sizing.dry_run", fake, raising=False)
    for name in [name for name in os.environ if name.startswith("REPSFT_")]:
        monkeypatch.delenv(name)
    return fake


def config_of(trainer):
    return trainer.calls[-1][1][0]


class TestTrain:
    def test_flags_become_settings(self, trainer):
        assert (
            cli.main(
                ["train", *LEAST, "--optim.lr", "1e-4", "--optim.betas", "[0.8, 0.9]", "--batch.tokens=8192"]
            )
            == 0
        )
        config = config_of(trainer)
        assert (config.run.folder, config.optim.lr, config.optim.betas, config.batch.tokens) == (
            "r",
            1e-4,
            (0.8, 0.9),
            8192,
        )
        assert (trainer.calls[-1][0], trainer.calls[-1][2]) == ("train", {"resume": False})

    def test_file_then_environment_then_flags(self, trainer, tmp_path, monkeypatch):
        path = tmp_path / "run.yaml"
        path.write_text("optim: {lr: 1e-4, eps: 1e-4, weight_decay: 0.1}\n")
        monkeypatch.setenv("REPSFT_OPTIM__EPS", "2e-4")
        monkeypatch.setenv("REPSFT_OPTIM__WEIGHT_DECAY", "0.2")
        assert cli.main(["train", "--config", str(path), *LEAST, "--optim.weight_decay", "0.3"]) == 0
        optim = config_of(trainer).optim
        assert (optim.lr, optim.eps, optim.weight_decay) == (1e-4, 2e-4, 0.3)

    def test_a_recipe_by_name(self, trainer):
        assert cli.main(["train", "--config", "paper_a", "--data.samples", "200"]) == 0
        assert (config_of(trainer).budget.updates, config_of(trainer).data.samples) == (51200, 200)

    @pytest.mark.parametrize(
        ("flags", "name", "value"),
        [
            (
                ["--data.train", "{math: a.jsonl, code: [b, c]}"],
                "data.train",
                {"math": "a.jsonl", "code": ["b", "c"]},
            ),
            (["--data.train", "a", "--data.train", "b"], "data.train", ["a", "b"]),
            (["--data.train", "[a, b]"], "data.train", ["a", "b"]),
            (["--data.train", "a, b.jsonl"], "data.train", "a, b.jsonl"),
            (["--log.trackers", "[wandb, tensorboard]"], "log.trackers", ["wandb", "tensorboard"]),
            (["--log.trackers", "wandb", "--log.trackers", "trackio"], "log.trackers", ["wandb", "trackio"]),
            (
                ["--mixture.weights", "{a: 1}", "--mixture.weights", "{b: 2}"],
                "mixture.weights",
                {"a": 1.0, "b": 2.0},
            ),
            (["--optim.max_norm", "null"], "optim.max_norm", None),
            (["--stop.token_accuracy", "null"], "stop.token_accuracy", None),
            (["--model.compile"], "model.compile", True),
            (["--model.compile", "false"], "model.compile", False),
            (["--model.lora.rank", "8"], "model.lora.rank", 8),
            (["--model.lora", "{rank: 4}"], "model.lora.rank", 4),
            (["--model.lora", "null"], "model.lora", None),
            (["--snapshot.device_bytes", "2GiB"], "snapshot.device_bytes", 2**31),
            (["--tokenizer.chat_template", "{{ bos }}: x"], "tokenizer.chat_template", "{{ bos }}: x"),
        ],
    )
    def test_values_are_written_as_in_yaml(self, trainer, flags, name, value):
        least = [flag for i, flag in enumerate(LEAST) if not (flags[0] == "--data.train" and i in (4, 5))]
        assert cli.main(["train", *least, *flags]) == 0
        got = config_of(trainer)
        for step in name.split("."):
            got = getattr(got, step)
        assert got == value

    def test_every_setting_has_a_flag(self, trainer):
        given = [
            f"--{name}={setting.default}"
            for name, setting in settings().items()
            if setting.default is not None
        ]
        given = [
            flag for flag in given if not flag.startswith(("--model.lora", "--model.path", "--budget.epochs"))
        ]
        assert len(given) > 75
        assert cli.main(["train", *LEAST, *given]) == 0
        assert config_of(trainer) == Config.of(
            dict(zip((flag.removeprefix("--") for flag in LEAST[::2]), LEAST[1::2]))
        )

    def test_resume_is_handed_on(self, trainer):
        assert cli.main(["train", *LEAST, "--resume"]) == 0
        assert (trainer.calls[-1][0], trainer.calls[-1][2]) == ("train", {"resume": True})

    @pytest.mark.parametrize("verb", ["train", "msft"])
    def test_a_dry_run_trains_nothing(self, trainer, verb):
        flags = ["--data.validation_fraction", "0.5", "--data.task_column", "t"]
        assert cli.main([verb, *LEAST, *flags, "--dry-run", "--resume"]) == 0
        assert cli.main([verb, *LEAST, *flags, "--dry-run", "--world", "8"]) == 0
        assert [(call[0], call[2]) for call in trainer.calls] == [
            ("dry_run", {"ranks": None}),
            ("dry_run", {"ranks": 8}),
        ]

    def test_a_world_that_is_not_here_is_for_a_dry_run(self, trainer, capsys):
        assert cli.main(["train", *LEAST, "--world", "8"]) == 2
        assert "--world: trains nothing; add --dry-run" in capsys.readouterr().err
        assert trainer.calls == []


class TestOtherVerbs:
    def test_each_calls_its_function(self, trainer):
        assert cli.main(["inspect", *LEAST, "--show", "5"]) == 0
        assert (trainer.calls[-1][0], trainer.calls[-1][2]) == ("inspect", {"show": 5})
        assert cli.main(["demo", "--folder", "x"]) == 0
        assert trainer.calls[-1] == ("demo", ("x",), {})
        assert cli.main(["doctor"]) == 0
        assert trainer.calls[-1][0] == "doctor"

    def test_demo_and_doctor_need_no_settings_and_take_none(self, trainer, capsys):
        assert cli.main(["demo", "--optim.lr", "3"]) == 2
        assert "--optim.lr is not an option" in capsys.readouterr().err

    def test_export_takes_the_run_and_where_to_and_what(self, trainer):
        assert cli.main(["export", "runs/a"]) == 0
        nothing = {"to": None, "generation": None, "merge": None, "dtype": None, "base": None}
        assert trainer.calls[-1] == ("export", ("runs/a",), nothing)
        given = ["--to", "m", "--generation", "12", "--merge", "false", "--dtype", "float32", "--base", "b"]
        assert cli.main(["export", *given, "runs/a"]) == 0
        assert trainer.calls[-1][2] == {
            "to": "m",
            "generation": 12,
            "merge": "false",
            "dtype": "float32",
            "base": "b",
        }

    def test_export_without_a_run_or_with_two(self, trainer, capsys):
        assert cli.main(["export"]) == 2
        assert "required: RUN" in capsys.readouterr().err
        assert cli.main(["export", "a", "b"]) == 2
        assert "got b" in capsys.readouterr().err
        assert trainer.calls == []

    @pytest.mark.parametrize(("ends", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)])
    def test_bench_hands_everything_on(self, monkeypatch, tmp_path, capfd, ends, code):
        """To the benchmarks beside the package, in the current folder, which may hold others."""
        for name, text in (
            ("checkout", f"print(os.getcwd(), sys.argv[1:], flush=True); {ends}"),
            ("here", "1 / 0"),
        ):
            (tmp_path / name / "benchmarks").mkdir(parents=True)
            (tmp_path / name / "benchmarks" / "__init__.py").touch()
            (tmp_path / name / "benchmarks" / "__main__.py").write_text(f"import os, sys; {text}")
        monkeypatch.setattr(bench, "CHECKOUT", tmp_path / "checkout")
        monkeypatch.chdir(tmp_path / "here")
        before = list(sys.path)
        assert cli.main(["bench", "compare", "HEAD~1", "HEAD"]) == code
        assert cli.main(["bench"]) == code
        assert capfd.readouterr().out.splitlines() == [
            f"{tmp_path / 'here'} {arguments}" for arguments in (["compare", "HEAD~1", "HEAD"], [])
        ]
        assert sys.path == before

    def test_a_request_to_end_reaches_the_benchmark(self, monkeypatch, tmp_path):
        """Or it would go on measuring, on its GPU, when nobody waits for it."""
        (tmp_path / "benchmarks").mkdir()
        (tmp_path / "benchmarks" / "__init__.py").touch()
        asks = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
        (tmp_path / "benchmarks" / "__main__.py").write_text(asks)
        monkeypatch.setattr(bench, "CHECKOUT", tmp_path)
        before = signal.getsignal(signal.SIGTERM)
        assert cli.main(["bench"]) == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is before

    def test_bench_outside_a_checkout_says_so(self, monkeypatch, tmp_path, capsys):
        assert bench.CHECKOUT == ROOT
        monkeypatch.setattr(bench, "CHECKOUT", tmp_path / "site-packages")
        assert cli.main(["bench", "gate"]) == 2
        assert "run it from a checkout" in capsys.readouterr().err

    def test_benchs_own_usage_errors_end_with_2(self, capfd):
        assert cli.main(["bench", "compare", "HEAD"]) == 2
        assert "usage: repsft bench compare" in capfd.readouterr().err
        assert cli.main(["bench", "compare", "no-such-revision", "HEAD"]) == 2
        assert "no-such-revision is not a revision" in capfd.readouterr().err

    def test_the_settings_page(self, trainer, capsys):
        assert cli.main(["doctor", "--settings"]) == 0
        assert capsys.readouterr().out == settings_page()
        assert trainer.calls == []


class TestExitCodes:
    @pytest.mark.parametrize("code", [0, 1, 130, 143])
    def test_a_results_code_is_the_process_code(self, trainer, code):
        trainer.answer = types.SimpleNamespace(exit_code=code)
        assert cli.main(["train", *LEAST]) == code

    @pytest.mark.parametrize(
        ("error", "code"), [(DataError("rows"), 2), (TrainingError("died"), 1), (KeyboardInterrupt(), 130)]
    )
    def test_errors(self, trainer, error, code, capsys):
        trainer.answer = error
        assert cli.main(["train", *LEAST]) == code
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        assert str(error) in printed.err
        assert printed.out == ""

    def test_a_traceback_on_request(self, trainer, capsys):
        trainer.answer = TrainingError("died")
        assert cli.main(["train", *LEAST, "--traceback"]) == 1
        assert "Traceback" in capsys.readouterr().err

    def test_our_own_bugs_are_not_dressed_up(self, trainer):
        trainer.answer = ZeroDivisionError("a bug")
        with pytest.raises(ZeroDivisionError):
            cli.main(["train", *LEAST])


class TestRefusals:
    def refused(self, capsys, *arguments):
        assert cli.main(list(arguments)) == 2
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        assert printed.out == ""
        return printed.err

    def test_everything_at_once(self, trainer, tmp_path, monkeypatch, capsys):
        path = tmp_path / "run.yaml"
        path.write_text("optim: {warmup_fracton: 1}\nbatch: {samples: 0}\n")
        monkeypatch.setenv("REPSFT_LOSS__AVG", "token")
        flags = ["--optim.lrr", "3", "--resum", "--stop.token_accuracy=97", "--data.train", "a"]
        told = self.refused(capsys, "train", "--config", str(path), *flags)
        for piece in (
            "9 errors",
            "optim.lrr is not a setting; did you mean optim.lr?",
            "--resum is not an option; did you mean --resume?",
            "optim.warmup_fracton is not a setting; did you mean optim.warmup_fraction? (run.yaml line 1)",
            "loss.avg is not a setting; did you mean loss.average? (environment variable REPSFT_LOSS__AVG)",
            "batch.samples: cannot be used",
            "(--stop.token_accuracy)",
            "run.folder: is missing",
            "model: has neither path nor config",
            "budget: has no limit",
        ):
            assert piece in told
        assert trainer.calls == []

    @pytest.mark.parametrize(
        ("arguments", "piece"),
        [
            (["trian"], "trian is not a verb; did you mean train?"),
            (
                ["qqq"],
                "qqq is not a verb; there are train, msft, demo, eval, export, inspect, compare, doctor, selftest, bench",
            ),
            (["train", "--config", "none.yaml"], "none.yaml: no such settings file"),
            (["train", *LEAST, "--optim.lr"], "--optim.lr"),
            (["train", *LEAST, "stray"], "an argument that belongs to no flag, got stray"),
            (["train", *LEAST, "--dry_run"], "did you mean --dry-run?"),
            (["train", *LEAST, "--optim.weight-decay", "1"], "did you mean optim.weight_decay?"),
            (
                ["train", *LEAST, "--optim.lr", "fast"],
                "optim.lr: cannot be used, expected a valid number, got fast (--optim.lr)",
            ),
            (["inspect", *LEAST, "--show", "many"], "--show"),
            (["--nonsense"], "a verb is missing"),
            ([], "usage: repsft"),
        ],
    )
    def test_one_by_one(self, trainer, capsys, arguments, piece):
        assert piece in self.refused(capsys, *arguments)
        assert trainer.calls == []

    def test_abbreviated_flags_are_not_guessed(self, trainer, capsys):
        assert "--run.fold" in self.refused(capsys, "train", *LEAST[2:], "--run.fold", "x").replace(
            "run.fold is", "--run.fold is"
        )

    def test_only_one_rank_tells_of_bad_settings_and_every_rank_of_its_own_misfortune(
        self, trainer, monkeypatch, capsys
    ):
        monkeypatch.setenv("RANK", "1")
        assert cli.main(["train"]) == 2
        assert "rank 1" in capsys.readouterr().err, (
            "a number left over in a shell: there is nobody else to tell"
        )
        monkeypatch.setenv("WORLD_SIZE", "2")
        # which would wait for the other
        monkeypatch.setattr("repsft_fast.distributed.abort_launch", lambda error: None)
        assert cli.main(["train"]) == 2
        assert capsys.readouterr().err == ""
        trainer.answer = TrainingError("a dead peer")
        assert cli.main(["train", *LEAST]) == 1
        assert "rank 1" in capsys.readouterr().err


class TestHelp:
    def help_of(self, *arguments):
        """In a process of its own: what is imported counts, and the seconds it computes."""
        code = (
            "import sys; from repsft_fast.cli import main; code = main(sys.argv[1:]);"
            "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'matplotlib'} & set(sys.modules);"
            "assert not heavy, heavy; sys.exit(code)"
        )
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "COLUMNS": "100"},
        )
        assert done.returncode == 0, done.stderr
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time: what other jobs on the machine do must not decide.
        return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def test_is_quick_and_loads_nothing_heavy(self):
        text, seconds = min((self.help_of("--help") for _ in range(3)), key=lambda answer: answer[1])
        assert seconds < 1.0
        assert all(verb in text for verb in ("train", "msft", "demo", "export", "inspect", "doctor", "bench"))

    def test_of_train_names_every_setting_with_its_default_and_fits_the_terminal(self):
        text, _ = self.help_of("train", "--help")
        for name in setting_names():
            assert f"--{name} " in text
        flat = " ".join(text.split())
        assert "Peak learning rate. [2e-05]" in flat
        assert "[required]" in flat
        assert "JSON" not in text
        assert max(len(line) for line in text.splitlines()) <= 130
        assert text.count("usage:") == 1
        assert len(text.splitlines()[0]) < 100

    def test_of_the_small_verbs(self):
        assert "--folder" in self.help_of("demo", "--help")[0]
        assert "--settings" in self.help_of("doctor", "--help")[0]
        assert "--show" in self.help_of("inspect", "--help")[0]
        text = self.help_of("export", "--help")[0]
        assert "usage: repsft export RUN [options]" in text
        assert "The run's folder" in text
        assert "(default" not in text

    def test_the_module_runs_too(self):
        done = subprocess.run(
            [sys.executable, "-m", "repsft_fast", "train", "--optim.lrr", "1"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert "did you mean optim.lr?" in done.stderr
        assert "Traceback" not in done.stderr
