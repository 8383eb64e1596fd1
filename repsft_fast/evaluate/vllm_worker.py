"""The child process of `evaluate.vllm_child`: one folder of requests answered by vLLM.

    python vllm_worker.py FOLDER

It knows the standard library and vllm, nothing of ours: it may run under a Python of its own.

    engine.json     {"arguments": of vllm.LLM, "probe": [[token ids], …]}
    requests.jsonl  {"id", "ids", "sampling": of vllm.SamplingParams}, one a line
    probe.json      written first: {"logprobs": [[of every token of a probe prompt but its first], …]}
    replies.jsonl   {"id", "ids", "reason"} as replies end; "reason" as vLLM has it: stop, length, …
    alive           touched while there is progress

After the probe it waits for a word on stdin: until then nothing is generated. When stdin closes, the parent
is gone, and so are this process and those that vLLM started.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def main(folder: Path) -> None:
    go = threading.Event()
    threading.Thread(target=_watch, args=(go,), daemon=True).start()
    engine = json.loads((folder / "engine.json").read_text(encoding="utf-8"))

    from vllm import LLM

    llm = LLM(**engine["arguments"])
    _write_probe(folder, _probe(llm, engine["probe"]))
    go.wait()
    _answer(llm, folder)


def _watch(go: threading.Event) -> None:
    # Not through sys.stdin: a thread that waits in it spoils the end of the interpreter.
    while os.read(0, 1):
        go.set()
    if os.getpgrp() == os.getpid():  # else the group is somebody else's
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _probe(llm: Any, prompts: list[list[int]]) -> list[list[float]]:
    from vllm import SamplingParams

    asked = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
    return [
        # of the first token there is none
        [places[token].logprob for token, places in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
        for ids, output in zip(prompts, outputs, strict=True)
    ]


def _write_probe(folder: Path, logprobs: list[list[float]]) -> None:
    """Whole or not at all: the parent looks for the file."""
    new = folder / "probe.json.new"
    new.write_text(json.dumps({"logprobs": logprobs}), encoding="utf-8")
    new.replace(folder / "probe.json")


def _answer(llm: Any, folder: Path) -> None:
    from vllm import SamplingParams

    lines = (folder / "requests.jsonl").read_text(encoding="utf-8").splitlines()
    requests = [json.loads(line) for line in lines]
    prompts = [{"prompt_token_ids": request["ids"]} for request in requests]
    asked = [SamplingParams(**request["sampling"]) for request in requests]
    numbers = llm.enqueue(prompts, asked, use_tqdm=False)
    # What comes back is named by the number alone, without what vLLM adds to it.
    named = {
        number.partition("-")[0]: request["id"] for number, request in zip(numbers, requests, strict=True)
    }
    with open(folder / "replies.jsonl", "a", encoding="utf-8") as file:
        while llm.llm_engine.has_unfinished_requests():
            ended = [output for output in llm.llm_engine.step() if output.finished]
            for output in ended:
                reply = output.outputs[0]
                line = {
                    "id": named[output.request_id],
                    "ids": list(reply.token_ids),
                    "reason": reply.finish_reason,
                }
                file.write(json.dumps(line) + "\n")
            file.flush()
            (folder / "alive").touch()


if __name__ == "__main__":
    # Modules beside this file would hide others of their names.
    if sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
        del sys.path[0]
    main(Path(sys.argv[1]))
