"""A stand-in for vllm, found by a child process whose PYTHONPATH leads here. It takes the names that
tests/evaluate/vllm_0_33_0.json lists and no other, and answers by a hash.

What it is to do wrong is said as JSON in the variable VLLM_STANDIN:

    weights    number of the weights whose log-probabilities it gives; 0: the model's own
    dies       after so many replies: killed
    hangs      after so many replies; -1: while it loads
    slow       so many steps of 0.3 s that end no request
    starts     a process of its own that outlives it, its number in this file
    reason     why every reply ended
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

API = json.loads((Path(__file__).parents[2] / "evaluate" / "vllm_0_33_0.json").read_text(encoding="utf-8"))
WRONG = json.loads(os.environ.get("VLLM_STANDIN", "{}"))


def logprobs_of(ids, weights=0):
    """Of every token but the first."""
    return [-1 - _number(weights, ids[: n + 1]) % 1000 / 500 for n in range(1, len(ids))]


def reply_of(ids, sampling):
    """(tokens, why it ended)"""
    length = 1 + _number("length", ids, sampling["seed"]) % 9
    if not sampling["stop_token_ids"]:  # nothing ends it
        length = sampling["max_tokens"]
    tokens = [100 + _number("token", ids, sampling["seed"], n) % 50 for n in range(length)]
    if length >= sampling["max_tokens"]:
        return tokens[: sampling["max_tokens"]], "length"
    return [*tokens, sampling["stop_token_ids"][0]], "stop"


def _number(*parts):
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=6).digest(), "little")


def _checked(given, *lists):
    known = set().union(*(API[name] for name in lists))
    assert set(given) <= known, f"vllm {API['version']} knows no {sorted(set(given) - known)}"


class SamplingParams:
    def __init__(self, **given):
        _checked(given, "SamplingParams")
        self.given = given


class LLM:
    def __init__(self, **given):
        _checked(given, "LLM", "EngineArgs")
        print("loading", given["model"], flush=True)
        self.llm_engine = SimpleNamespace(has_unfinished_requests=lambda: bool(self._queue), step=self._step)
        self._queue, self._asked, self._answered = [], 0, 0
        if WRONG.get("starts"):
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            Path(WRONG["starts"]).write_text(str(child.pid))
        self._go_wrong(-1)

    def generate(self, prompts, sampling_params, **given):
        _checked(given, "LLM.generate")
        assert sampling_params.given["prompt_logprobs"] == 1
        self._asked += len(prompts)
        return [self._probed(prompt["prompt_token_ids"]) for prompt in prompts]

    def _probed(self, ids):
        numbers = logprobs_of(ids, WRONG.get("weights", 0))
        places = [{t: SimpleNamespace(logprob=p)} for t, p in zip(ids[1:], numbers, strict=True)]
        return SimpleNamespace(prompt_logprobs=[None, *places])

    def enqueue(self, prompts, sampling_params, **given):
        _checked(given, "LLM.enqueue")
        numbers = [str(self._asked + n) for n in range(len(prompts))]
        self._asked += len(prompts)
        self._queue = list(zip(numbers, prompts, sampling_params, strict=True))
        return [f"{number}-0a1b2c3d" for number in numbers]

    def _step(self):
        """Nothing at first, then what came last."""
        self._go_wrong(self._answered)
        if WRONG.get("slow", 0) > 0:
            WRONG["slow"] -= 1
            time.sleep(0.3)
            return []
        number, prompt, asked = self._queue.pop()
        tokens, reason = reply_of(prompt["prompt_token_ids"], asked.given)
        reply = SimpleNamespace(token_ids=tuple(tokens), finish_reason=WRONG.get("reason", reason))
        self._answered += 1
        unfinished = SimpleNamespace(request_id=number, finished=False)
        return [unfinished, SimpleNamespace(request_id=number, finished=True, outputs=[reply])]

    def _go_wrong(self, now):
        if WRONG.get("dies") == now:
            print("the last words of the engine", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        while WRONG.get("hangs") == now:
            time.sleep(1)
