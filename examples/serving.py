"""Serves a model under a policy with vLLM, and reads an answer as it is streamed.

python -P examples/serving.py --prompt "Write a story." 2>log   # starts a server, asks it, and stops it
python -P examples/serving.py --url http://localhost:8000       # asks one that runs
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence

from kvpolicy.runtimes.opening import locate


def command(model: str, policy: str, budget: int, port: int) -> list[str]:
    """Return what starts the server: vLLM's own, with the plugin's worker and settings."""
    return [
        sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port),
        "--dtype", "float32", "--max-model-len", "2048", "--block-size", "32", "--enforce-eager",
        "--no-enable-prefix-caching", "--worker-cls", "kvpolicy.runtimes.vllm.Worker",
        "--additional-config", json.dumps({"kvpolicy": {"policy": policy, "budget": budget}}),
    ]  # fmt: skip


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    """Return as soon as a server answers; exit with its last words when it ends before."""
    while server.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}/health", timeout=5).close()  # noqa: S310 - an address of this machine
            return
        time.sleep(1)
    raise SystemExit(f"the server at {url} has ended with {server.returncode}; its last line above says why")


def stream(url: str, prompt: str, tokens: int) -> Iterator[str]:
    """Yield the answer piece by piece: the server sends a line of JSON for each."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as known:  # noqa: S310
        model = json.load(known)["data"][0]["id"]
    wish = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    sent, kind = json.dumps(wish).encode(), {"Content-Type": "application/json"}
    ask = urllib.request.Request(f"{url}/v1/completions", sent, kind)  # noqa: S310 - an address that the user gives
    with urllib.request.urlopen(ask, timeout=600) as answer:  # noqa: S310
        for line in answer:
            data = line.decode().removeprefix("data: ").strip()
            if data and data != "[DONE]":
                yield json.loads(data)["choices"][0]["text"]


def main(argv: Sequence[str] | None = None) -> str:
    """Ask, and print the answer as it comes; return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="of a server that runs")
    parser.add_argument("--prompt", default="Once upon a time")
    for name, default in {"model": "smollm2", "policy": "rkv", "budget": 256, "tokens": 600, "port": 8123}.items():
        parser.add_argument(f"--{name}", default=default, type=type(default))
    options = parser.parse_args(argv)
    url, answer = options.url or f"http://localhost:{options.port}", ""
    with contextlib.ExitStack() as stack:
        if options.url is None:
            place = str(locate(options.model, user="this example"))
            asked = command(place, options.policy, options.budget, options.port)
            server = subprocess.Popen(asked, stdout=2)  # noqa: S603 - its log goes to stderr
            stack.callback(server.wait)
            stack.callback(server.terminate)
            wait_for(url, server)
        for piece in stream(url, options.prompt, options.tokens):
            print(piece, end="", flush=True)
            answer += piece
    return answer


if __name__ == "__main__":
    main()
