"""Two trees, the same runs: every figure that a run leaves behind must be the same, bit for bit.

`python -m tests.golden OLD_COMMIT` from the repository's root runs the cases of tests.golden_cases by the tree of that commit
and by the working tree, compares what they left, prints every difference and exits with 1 when there is one. `--only CASE …`
takes some of them; `--keep FOLDER` leaves the runs there. `--write` runs the working tree alone and writes counts and
decisions to tests/golden.json, which tests/test_golden.py holds runs against.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from tests.golden_cases import BASE, CASES, Case, Step, material

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
KEPT = HERE / "golden.json"
# Names that users see and that the new tree has changed: old → new. Keys of JSON, YAML and settings (a key, or its whole
# dotted path), and parts of the paths of files.
RENAMED: dict[str, str] = {}
# Keys that the new tree writes and the old one did not: of a decision in a checkpoint why it was taken, as a code;
# what a run decided once beside the head's chunks.
ADDED = re.compile(
    r"conductor\.history\.decisions\.\d+\.decision\.(code|stop_reason)|decided\.choices(\..*)?"
    r"|model\.cuda_graphs|batch\.row_lengths|distributed\.keep_gathered"
)
# Keys of the clock, of its rates and of this machine's memory: they are not compared, nor is anything below them.
LEFT_OUT = re.compile(r"seconds|.*_seconds|.*_per_second|mfu|memory_bytes|data_wait_fraction|metrics_bytes")
# The same of single files: digests and lengths of what holds such figures.
LEFT_OUT_PLACES = re.compile(r"MANIFEST\.json:(hash|files\.values-.*\.(bytes|hash))")
LEFT_OUT_FILES = re.compile(r"run\.png|\.lock|LATEST.*|\.made\.json|settings\.yaml")
CLOCK_WORDS = re.compile(
    r"\b[\d.,]+k? (ms|s|min|h|tok/s|[KMG]iB)(?!\w)|(?<=outside training and evaluation )[\d.]+"
)
LIVE_LINE = re.compile(r".*update \d+/\d+  .*")  # how many of them there are is the clock's choice
OF_THE_KILL = re.compile(r"result\.json:more\.snapshots\..*")
IN_THE_BACKGROUND = (
    "checkpoint_written"  # lines of a thread: neither their place nor the update they name is certain
)
# Of a run that was killed: these lines alone, no checkpoints and no snapshots, since they tell at which moment that was.
COMPUTED = {"update", "epoch", "evaluation", "roll_back", "revert", "stage", "decision", "decay"}
TIMEOUT_S = 120  # of one command, on a machine that is not idle
MOST_SHOWN = 12

Values = dict[tuple[str, str, str], Any]  # (file, line, key) → value


class Tree:
    """One tree, its process that runs commands, and the folder its runs lie in."""

    def __init__(self, code: Path, runs: Path, rows: Path, renamed: Mapping[str, str]):
        """renamed: what the old names of settings are here."""
        self.code, self.runs, self.rows, self.renamed = code, runs, rows, renamed
        self.environment = {
            name: text for name, text in os.environ.items() if not name.startswith(("REPSFT_", "PYTHON"))
        }
        self.environment.update(
            PYTHONPATH=str(code), PYTHONHASHSEED="0", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", COLUMNS="100",
            HOME=str(runs / "home"), XDG_CACHE_HOME=str(runs / "home"),
        )  # fmt: skip
        (runs / "home").mkdir(parents=True)
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(HERE / "golden_runner.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=self.environment, cwd=runs, text=True,
        )  # fmt: skip

    def __enter__(self) -> Tree:
        where = Path(json.loads(self._answer()))
        if not where.is_relative_to(self.code):
            raise SystemExit(f"repsft_fast comes from {where} and not from {self.code}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()  # between two commands it holds nothing
        self.process.wait()

    def _answer(self) -> str:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise SystemExit(f"the runner of {self.code} ended without an answer")
        return line

    def run(self, name: str, case: Case) -> list[str]:
        """All steps of the case; what went otherwise than it should, in words."""
        folder = self.runs / name
        folder.mkdir()
        settings = {**BASE, "run.folder": "RUN", "data.cache_folder": "CASE/cache", **case.changes}
        wrong = []
        for number, step in enumerate(case.steps):
            settings.update(step.changes)
            nested: dict[str, dict[str, Any]] = {}
            for dotted, value in settings.items():
                section, _, key = self.renamed.get(dotted, dotted).partition(".")
                nested.setdefault(self.renamed.get(section, section), {})[self.renamed.get(key, key)] = value
            (folder / "settings.yaml").write_text(self._placed(json.dumps(nested), folder))
            codes = self._step(folder, number, step)
            if codes != [step.code] * step.ranks:
                told = "".join(
                    path.read_text()[-1500:] for path in sorted(folder.glob(f"step{number:02}.*err"))
                )
                wrong.append(f"step {number} ended with {codes} and not with {step.code}\n{told}")
        if not wrong and not case.holds(facts(self, name)):
            wrong.append(f"what the case is for did not happen: {facts(self, name)}")
        return wrong

    def _placed(self, text: str, folder: Path) -> str:
        for word, path in (("RUN", folder / "run"), ("CASE", folder), ("ROWS", self.rows)):
            text = re.sub(rf"\b{word}\b", str(path), text)
        return text

    def _step(self, folder: Path, number: int, step: Step) -> list[int]:
        arguments = [step.verb, *(["--config", str(folder / "settings.yaml")] if step.settings else [])]
        arguments += [self._placed(flag, folder) for flag in step.flags]
        out = str(folder / f"step{number:02}")
        if step.cold:
            command = [sys.executable, "-P", "-m", "repsft_fast", *arguments]
            with open(out + ".out", "w") as told, open(out + ".err", "w") as errors:
                run = partial(
                    subprocess.run, env=self.environment, cwd=folder, timeout=TIMEOUT_S, check=False
                )
                return [run(command, stdout=told, stderr=errors).returncode]
        request = {
            "arguments": arguments, "environments": _ranks(step.ranks), "out": out, "timeout_s": TIMEOUT_S,
            "signal": step.signal, "after": step.after, "metrics": str(folder / "run" / "metrics.jsonl"),
        }  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        codes: list[int] = json.loads(self._answer())
        return codes


def _ranks(size: int) -> list[dict[str, str]]:
    if size == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(probe.getsockname()[1]),
            "WORLD_SIZE": str(size),
        }
    return [{**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def facts(tree: Tree, name: str) -> dict[str, Any]:
    """Counts and decisions of a run: what is the same on every machine. Words may hold figures, and are not among them."""
    run = tree.runs / name / "run"
    if not (run / "result.json").exists():
        return {"kinds": {}, "result": {}, "decisions": []}
    old_names = {new: old for old, new in tree.renamed.items()}

    def read(text: str) -> Any:
        return json.loads(
            text, object_hook=lambda found: {old_names.get(key, key): found[key] for key in found}
        )

    lines = [read(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result = read((run / "result.json").read_text())
    shown = ("success", "code", "updates", "tokens", "trained_tokens", "seed")
    decided = [line for line in lines if line["kind"] in COMPUTED - {"update", "epoch", "evaluation"}]
    counts = ("vetoed", "spiked", "dropped", "work")
    return {
        "kinds": dict(sorted(Counter(line["kind"] for line in lines if line["kind"] in COMPUTED).items())),
        "result": {key: result[key] for key in shown} | {key: result["more"][key] for key in counts},
        "decisions": [
            {key: value for key, value in line.items() if _whole(value) and key not in ("text", "reason")}
            for line in decided
        ],
    }


def _whole(value: Any) -> bool:
    return isinstance(value, int | str) or (isinstance(value, list) and all(map(_whole, value)))


def flat(value: Any, renamed: Mapping[str, str], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a document under its dotted key, without what is left out."""
    if isinstance(value, dict | list) and value:
        for key, below in value.items() if isinstance(value, dict) else enumerate(value):
            whole = f"{path}.{key}" if path else str(key)
            if not LEFT_OUT.fullmatch(str(key)):
                whole = f"{path}.{renamed.get(whole, renamed.get(str(key), str(key)))}".removeprefix(".")
                yield from flat(below, renamed, whole)
    else:
        yield path, CLOCK_WORDS.sub("TIME", value) if isinstance(value, str) else value


def tensors(path: Path) -> Iterator[tuple[str, Any]]:
    """Type, shape and sha256 of every tensor of a safetensors file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for name, told in sorted(json.loads(content[8:start]).items()):
        if name == "__metadata__":
            yield from flat(told, {}, name)
            continue
        first, last = told["data_offsets"]
        digest = hashlib.sha256(content[start + first : start + last]).hexdigest()
        yield name, f"{told['dtype']} {told['shape']} {digest[:32]}"


def left_by(tree: Tree, name: str, case: Case, renamed: Mapping[str, str]) -> Values:
    """Everything that the case left and that is compared."""
    folder, found = tree.runs / name, Values()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        place = path.relative_to(folder)
        if LEFT_OUT_FILES.fullmatch(path.name) or place.parts[0] == "cache":
            continue
        if case.computed_only and ("checkpoints" in place.parts or path.suffix in (".out", ".err")):
            continue
        left_out = OF_THE_KILL if case.computed_only else LEFT_OUT_PLACES
        file = "/".join(renamed.get(part, part) for part in place.parts)
        for line, key, value in _read(path, tree, case, renamed):
            if not left_out.fullmatch(f"{path.name}:{key}"):
                found[file, line, key] = value
    return found


def _read(path: Path, tree: Tree, case: Case, renamed: Mapping[str, str]) -> Iterator[tuple[str, str, Any]]:
    if path.suffix == ".safetensors":
        yield from (("", name, value) for name, value in tensors(path))
        return
    try:
        text = path.read_text().replace(str(tree.runs), "RUNS").replace(str(tree.code), "CODE")
    except UnicodeDecodeError:
        yield "", "sha256", hashlib.sha256(path.read_bytes()).hexdigest()
        return
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in text.splitlines()]
        kept = [line for line in lines if not case.computed_only or line["kind"] in COMPUTED]
        late = [{**line, "update": None} for line in kept if line["kind"] == IN_THE_BACKGROUND]
        for number, line in enumerate(
            [*(line for line in kept if line["kind"] != IN_THE_BACKGROUND), *late], 1
        ):
            yield from ((str(number), key, value) for key, value in flat(line, renamed))
    elif path.suffix in (".json", ".yaml"):
        found = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
        yield from (("", key, value) for key, value in flat(found, renamed))
    else:
        told = [line for line in text.splitlines() if not LIVE_LINE.fullmatch(line)]
        if path.suffix in (".out", ".err") and case.steps[int(path.name[4:6])].prose:
            told = [" ".join(part.split()) for part in text.split("\n\n")]
        yield from ((str(number), "", CLOCK_WORDS.sub("TIME", line)) for number, line in enumerate(told, 1))


def differences(old: Values, new: Values) -> list[str]:
    found = []
    for place in dict.fromkeys([*old, *new]):
        before, after = (json.dumps(side[place]) if place in side else "nothing" for side in (old, new))
        file, line, key = place
        if before != after and not (place not in old and ADDED.fullmatch(key)):
            found.append(
                f"{file} · {'line ' + line + ' · ' if line else ''}{key}: {before[:120]} → {after[:120]}"
            )
    return found


Ran = tuple[Tree, dict[str, list[str]]]  # a tree, and of each case what went wrong


def copy_tree(to: Path, commit: str | None) -> Path:
    """The files of a commit, or those of the working tree that git does not ignore: it may change meanwhile."""
    to.mkdir(parents=True)
    run = partial(subprocess.run, cwd=ROOT, capture_output=True, check=True)
    if commit is not None:
        packed = run(["git", "archive", commit]).stdout
    else:
        names = run(["git", "ls-files", "-zco", "--exclude-standard"]).stdout.split(b"\0")
        here = [name for name in names if name and os.path.lexists(ROOT / os.fsdecode(name))]
        packed = run(["tar", "-c", "--null", "-T", "-"], input=b"\0".join(here)).stdout
    subprocess.run(["tar", "-x"], cwd=to, input=packed, check=True)
    return to


def run_trees(folder: Path, codes: Mapping[str, Path], names: Sequence[str]) -> dict[str, Ran]:
    """The cases by every tree, the trees beside each other."""
    rows = folder / "rows"
    renamed = {label: {} if label == "old" else RENAMED for label in codes}
    trees = {
        label: Tree(code, folder / "runs" / label, rows, renamed[label]) for label, code in codes.items()
    }
    material(rows)
    wrong: dict[str, dict[str, list[str]]] = {label: {} for label in trees}

    def work(label: str) -> None:
        with trees[label] as tree:
            for name in names:
                wrong[label][name] = tree.run(name, CASES[name])

    threads = [threading.Thread(target=work, args=(label,)) for label in trees]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for label in trees:
        for name in names:
            wrong[label].setdefault(name, ["it did not run to its end"])
    return {label: (tree, wrong[label]) for label, tree in trees.items()}


def compare(folder: Path, commit: str, names: Sequence[str]) -> int:
    """The exit code: 0 where nothing differs."""
    began = time.monotonic()
    codes = {label: copy_tree(folder / "code" / label, of) for label, of in (("old", commit), ("new", None))}
    done = run_trees(folder, codes, names)
    (old, old_wrong), (new, new_wrong) = done["old"], done["new"]
    failed, total, table = 0, 0, []
    for name in names:
        for label, wrong in (("old", old_wrong[name]), ("new", new_wrong[name])):
            for text in wrong:
                print(f"{name} · {label} tree · {text}")
        values = left_by(old, name, CASES[name], RENAMED)
        found = differences(values, left_by(new, name, CASES[name], {}))
        for text in found[:MOST_SHOWN]:
            print(f"{name} · {text}")
        if found[MOST_SHOWN:]:
            print(f"{name} · and {len(found) - MOST_SHOWN} more")
        bad = bool(found or old_wrong[name] or new_wrong[name])
        failed, total = failed + bad, total + len(values)
        table.append(f"{name:16} {len(values):7,} values  {'DIFFERS' if bad else 'equal'}")
    print("\n".join([*table, f"{'together':16} {total:7,} values  in {time.monotonic() - began:.0f} s"]))
    return int(failed > 0)


def kept_facts(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Counts and decisions of the working tree's runs. AssertionError where a run went wrong."""
    tree, wrong = run_trees(folder, {"new": ROOT}, names)["new"]
    problems = [f"{name}: {text}" for name in names for text in wrong[name]]
    assert not problems, "\n".join(problems)
    return {name: facts(tree, name) for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("commit", nargs="?", metavar="OLD_COMMIT")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--keep", metavar="FOLDER")
    given = parser.parse_args()
    if given.write == (given.commit is not None):
        parser.error("give the old commit, or --write")
    with tempfile.TemporaryDirectory(prefix="golden-") as made:
        folder = Path(given.keep or made).resolve()
        if not given.write:
            return compare(folder, given.commit, given.only)
        before = json.loads(KEPT.read_text()) if KEPT.exists() else {}
        found = kept_facts(folder, given.only)
        KEPT.write_text(json.dumps({**before, **found}, indent=1, sort_keys=True) + "\n")
        return 0


if __name__ == "__main__":
    sys.exit(main())
