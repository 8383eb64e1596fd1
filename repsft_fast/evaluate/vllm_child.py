"""Replies by vLLM in a child process, on a saved model's folder. Untried on a real engine.

Inside the training process it was seen to answer with base weights (TRL #5312). Requests and replies are
files (`evaluate.vllm_worker` says which), so a killed evaluation goes on where it was: what is answered is
not asked again. No reply is taken before the child has passed the probe (`evaluate.identity`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from repsft_fast import seeded
from repsft_fast.errors import ConfigError, TrainingError, describe
from repsft_fast.evaluate import vllm_worker
from repsft_fast.evaluate.asked import Generation, Request, Sampling
from repsft_fast.evaluate.identity import Bound, Scored, check_identity
from repsft_fast.files import replace_file

WHERE = "engine vllm"
LOG_TAIL = 2000  # characters of the child's log in an error
LOOK_S, END_S = 0.1, 10.0  # between looks at its files; for it to end when asked
# What a launcher says to its ranks: the child is none of them.
_LAUNCHER = {
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK",
    "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
}  # fmt: skip
# Temperatures between 0 and the first are raised to it, above the second refused (vllm.SamplingParams).
COOLEST, HOTTEST = 0.01, 2.0


class VllmChild:
    """asked.Engine on a saved model."""

    name = "vllm"

    def __init__(
        self,
        model_folder: Path,
        folder: Path,
        *,
        probe: Sequence[Sequence[int]],
        own: Sequence[Sequence[float]],
        bound: Bound,
        executable: str = sys.executable,
        arguments: Mapping[str, Any] | None = None,
        deadline_s: float = 900.0,
    ):
        """folder: for requests, replies and the log, kept to go on from. probe: prompts; own: this model's
        log-probabilities of every token of them but the first (`own_logprobs`); bound: of `check_identity`.
        executable: a Python with vllm. arguments: of vllm.LLM, beside ours. deadline_s: without progress,
        loading included.
        """
        self._model_folder, self._folder = Path(model_folder), Path(folder)
        self._probe, self._own, self._bound = [list(ids) for ids in probe], own, bound
        self._executable, self._arguments, self._deadline_s = executable, dict(arguments or {}), deadline_s

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        end_ids: Sequence[int],
        on_reply: Callable[[Request, Generation], None],
    ) -> None:
        """Entropy is not known here. A reply's stream follows from (sampling.seed + prompt, draw).

        ConfigError for a temperature that vLLM would change, ModelError when the child holds other weights,
        TrainingError when it dies, hangs or answers what it was not asked.
        """
        _check(sampling)
        self._folder.mkdir(parents=True, exist_ok=True)
        model = _fingerprint(self._model_folder)
        lines = [_line(request, sampling, end_ids, model) for request in requests]
        waiting = {line["id"]: request for line, request in zip(lines, requests, strict=True)}
        if len(waiting) < len(requests):
            raise ValueError("requests: expected each (prompt, draw) once")
        replies = _Replies(self._folder / "replies.jsonl", waiting, set(end_ids), on_reply)
        replies.read()  # of a run before this one
        lines = [line for line in lines if line["id"] in waiting]
        if lines:
            self._write(lines)
            with self._child() as child:
                self._follow(child, replies)

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        longest = max(len(line["ids"]) + line["sampling"]["max_tokens"] for line in lines)
        probed = max(map(len, self._probe)) + 1
        arguments = {
            "dtype": "bfloat16",
            "gpu_memory_utilization": 0.9,
            "seed": 0,  # every request has its own
            **self._arguments,
            "model": str(self._model_folder.resolve()),
            "max_model_len": max(longest, probed),  # a shorter one would cut replies
            "skip_tokenizer_init": True,  # tokens in, tokens out
        }
        for name in ("probe.json", "alive"):
            (self._folder / name).unlink(missing_ok=True)
        engine = json.dumps({"arguments": arguments, "probe": self._probe}, ensure_ascii=False)
        replace_file(self._folder / "engine.json", engine.encode(), "vllm engine")
        text = "".join(json.dumps(line) + "\n" for line in lines)
        replace_file(self._folder / "requests.jsonl", text.encode(), "vllm requests")

    @contextlib.contextmanager
    def _child(self) -> Iterator[subprocess.Popen[bytes]]:
        """The child in a process group of its own, gone with all of its processes at the end."""
        environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
        command = [self._executable, vllm_worker.__file__, str(self._folder.resolve())]
        with open(self._folder / "child.log", "wb") as log:
            try:
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=True,
                )
            except OSError as error:
                wrong, todo = f"cannot be started ({error})", "name a Python that has vllm"
                raise ConfigError(describe(WHERE, wrong, got=self._executable, todo=todo)) from error
        try:
            yield child
        finally:
            _end(child)

    def _follow(self, child: subprocess.Popen[bytes], replies: _Replies) -> None:
        """Until every request is answered."""
        probed, seen, since = False, None, time.monotonic()
        while replies.waiting:
            over = _is_over(child)  # before the look: what it wrote last is read
            if not probed and (self._folder / "probe.json").exists():
                self._check_probe()
                assert child.stdin is not None
                with contextlib.suppress(BrokenPipeError):  # it is over, and the next look says so
                    child.stdin.write(b"go\n")
                    child.stdin.flush()
                probed = True
            found = replies.read() if probed else 0
            now = (probed, found, _touched(self._folder / "alive"))
            if now != seen or found:
                seen, since = now, time.monotonic()
            elif over:
                raise self._failed(f"ended with {len(replies.waiting)} replies missing")
            elif time.monotonic() - since > self._deadline_s:
                raise self._failed(f"made no progress for {self._deadline_s:g} s")
            if not over:
                time.sleep(LOOK_S)

    def _check_probe(self) -> None:
        logprobs = json.loads((self._folder / "probe.json").read_text(encoding="utf-8"))["logprobs"]
        got = [Scored(tuple(ids), tuple(found)) for ids, found in zip(self._probe, logprobs, strict=True)]
        check_identity(self.name, got, self._own, self._bound)

    def _failed(self, wrong: str) -> TrainingError:
        path = self._folder / "child.log"
        tail = path.read_bytes()[-LOG_TAIL:].decode(errors="replace").strip()
        if tail.endswith("No module named 'vllm'"):
            todo = "pip install 'repsft-fast[vllm]', or use another engine"
            return TrainingError(describe(WHERE, "is not installed", got=self._executable, todo=todo))
        todo = f"the end of its log, {path}:\n{tail}"
        return TrainingError(describe(WHERE, wrong, todo=todo))


class _Replies:
    """The replies file, read as it grows. A line without its end is not read, and dropped when it was left by
    a run before this one."""

    def __init__(
        self,
        path: Path,
        waiting: dict[str, Request],
        ends: set[int],
        on_reply: Callable[[Request, Generation], None],
    ):
        self.path, self.waiting, self._ends, self._on_reply = path, waiting, ends, on_reply
        self._read = 0  # bytes
        if path.exists():
            whole = path.read_bytes().rpartition(b"\n")
            os.truncate(path, len(whole[0]) + len(whole[1]))

    def read(self) -> int:
        """Hands on what is new; returns how many lines there were."""
        if not self.path.exists():
            return 0
        with open(self.path, "rb") as file:
            file.seek(self._read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        lines = whole.splitlines()
        for line in lines:
            self._take(line)
        return len(lines)

    def _take(self, line: bytes) -> None:
        try:
            reply = json.loads(line)
            name, ids, reason = reply["id"], [int(token) for token in reply["ids"]], reply["reason"]
        except (ValueError, KeyError, TypeError) as error:
            wrong = f"{self.path.name} holds a line that is no reply ({type(error).__name__})"
            raise TrainingError(describe(WHERE, wrong, got=line.decode(errors="replace"))) from error
        request = self.waiting.get(name)
        if request is None:
            return  # of another evaluation in this folder
        finished = bool(ids) and ids[-1] in self._ends
        if reason not in ("stop", "length") or finished != (reason == "stop"):
            wrong = f"prompt {request.prompt}: its reply ended for {reason!r}, and not as asked"
            todo = f"remove {self.path} to ask again"
            raise TrainingError(
                describe(WHERE, wrong, expected="an end token or the length limit", todo=todo)
            )
        del self.waiting[name]
        self._on_reply(request, Generation(ids, finished))


def _check(sampling: Sampling) -> None:
    hot = sampling.temperature
    if hot != 0 and not COOLEST <= hot <= HOTTEST:
        expected = f"0, or {COOLEST:g} to {HOTTEST:g}"
        raise ConfigError(
            describe(f"{WHERE}: temperature", "would be another there", expected=expected, got=hot)
        )
    if sampling.max_new_tokens < 1:
        got = sampling.max_new_tokens
        raise ConfigError(describe(f"{WHERE}: new tokens", "too few", expected="at least 1", got=got))


def _line(request: Request, sampling: Sampling, end_ids: Sequence[int], model: str) -> dict[str, Any]:
    """A request as the child reads it. Its id names all that the reply hangs on."""
    asked = {
        "n": 1,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "seed": int(
            seeded.words(seeded.key_of("vllm", sampling.seed + request.prompt, request.draw), 1)[0] >> 33
        ),
        "stop_token_ids": sorted(set(end_ids)),
        "ignore_eos": True,  # the folder's own ends are not the task's
        "detokenize": False,
    }
    named = json.dumps([request.prompt, request.draw, request.ids, asked, model])
    digest = hashlib.blake2b(named.encode(), digest_size=12).hexdigest()
    return {"id": digest, "ids": list(request.ids), "sampling": asked}


def _fingerprint(folder: Path) -> str:
    """Changes when a file of the model does."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    found = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.blake2b(repr(found).encode(), digest_size=12).hexdigest()


def _touched(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _is_over(child: subprocess.Popen[bytes]) -> bool:
    """Looked at and not reaped: until then nobody else has its number, nor its group's."""
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _end(child: subprocess.Popen[bytes]) -> None:
    """Asked, then killed; with it what it has started, which may outlive it."""
    _signal(child, signal.SIGTERM)
    deadline = time.monotonic() + END_S
    try:
        while not _is_over(child) and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        _signal(child, signal.SIGKILL)
        if child.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
        child.wait()


def _signal(child: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)
