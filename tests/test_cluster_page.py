"""docs/cluster.md: its scripts parse, its commands are the command line's, its tables are what the code
prints."""

import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from repsft_fast import cli
from repsft_fast.distributed import handshake, launch, listening
from repsft_fast.memory.model_size import ModelSize
from repsft_fast.sizing import page
from repsft_fast.sizing.known_models import MODELS

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "cluster.md").read_text(encoding="utf-8")
SCRIPTS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = re.findall(r"(?:-m repsft_fast|^repsft) (.*)", PAGE.replace("\\\n", " "), re.MULTILINE)


def test_the_scripts_parse():
    assert len(SCRIPTS) == 2
    for script in SCRIPTS:
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("resume", ["", "--resume"])
@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_are_understood(command, resume, monkeypatch, tmp_path):
    """Every flag is known and every value usable; nothing is trained."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(
        "model: {path: m}\ndata: {train: d.jsonl}\nbudget: {epochs: 1}\nrun: {folder: r}\n"
    )
    called = []
    monkeypatch.setattr(
        cli.Train, "call", staticmethod(lambda config, options: called.append((config, options)))
    )
    filled = command.partition("#")[0].replace("$RESUME", resume).replace("$RUN", "runs/1")
    assert cli.run(shlex.split(filled)) == 0
    ((config, options),) = called
    assert options["resume"] is ("$RESUME" in command and bool(resume))
    assert config.distributed.shard_ranks == 8 or options["world"] == 32


def test_there_are_three_commands():
    assert len(COMMANDS) == 3


@pytest.mark.parametrize("name", ["SmolLM2-135M", "Qwen3-32B"])
def test_the_sizes_are_what_doctor_prints(name):
    table = PAGE.partition("<!-- made by: repsft doctor --plan -->")[2].partition("<!-- end -->")[0]
    printed = page.page([name])
    lines = [line for line in printed.splitlines() if line]
    assert [line for line in lines if line not in table.splitlines()] == []
    assert {line.split("|")[1].split()[0] for line in table.splitlines() if line.startswith("| ")} >= set(
        MODELS
    )


def test_the_table_on_paper_follows_its_formula():
    rows = re.findall(
        r"^\| (\S+) \| (\d+) \| ([\d.]+) GB \| (\d+) ms \| (\S+)(?: ms)? \| ([\d,]+) ms \|",
        PAGE,
        re.MULTILINE,
    )
    assert len(rows) == 9
    for name, gpus, sent, fast, slow, compute in rows:
        size = ModelSize.of(meta_model(name))
        root = sum(p.elements for p in size.parameters if p.layer is None)
        total = (2 * (2 * (size.count - root) + root) + 4 * size.count) * (int(gpus) - 1) / int(gpus)
        assert float(sent) == pytest.approx(total / 1e9, abs=0.051)
        assert int(fast) == round(total / 300e9 * 1e3)
        assert slow == "–" or int(slow.replace(",", "")) == round(total / 40e9 * 1e3)
        assert int(compute.replace(",", "")) == round(6 * size.count * 8192 / (0.45 * 989e12) * 1e3)


def meta_model(name):
    from repsft_fast.models.load import load_model

    return load_model(MODELS[name], device="meta")


def test_the_signals_are_those_that_are_listened_to():
    from repsft_fast.signals import CODES

    table = PAGE.partition("## Signals")[2].partition("## ")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| SIG")]
    said = {}
    for _, names, _, _, codes, _ in rows:
        said |= dict(zip(re.findall(r"SIG\w+", names), map(int, codes.split(","))))
    assert said == {signal.Signals(number).name: 128 + number for number in CODES}
    assert '[ "$CODE" = 138 ]' in PAGE, "the script goes on after the warning that it asks for"
    assert "--signal=USR1@" in PAGE


def test_the_variables_are_those_that_are_read():
    table = PAGE.partition("## What the launcher must say")[2].partition("## ")[0]
    for names in (
        launch._OURS,
        *launch._LAUNCHERS,
        (listening.LISTEN, handshake.SECRET, "MASTER_ADDR", "MASTER_PORT"),
    ):
        for name in names:
            short = name.replace("OMPI_COMM_WORLD_LOCAL_RANK", "_LOCAL_RANK").replace(
                "OMPI_COMM_WORLD_SIZE", "_SIZE"
            )
            assert f"`{short}`" in table, name
