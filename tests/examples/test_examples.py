"""Every example runs, stays within what its policy says, and is short enough to be read."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=[path.stem for path in SCRIPTS])
def test_it_is_a_script_of_under_80_lines_that_says_how_it_is_run(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    assert f"examples/{path.name}" in text.split('"""')[1]
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert f"[{path.name}]({path.name})" in page


def test_a_chat_whose_memory_never_grows(example, tiny, capsys):
    said = iter(["hello there, who are you", "and what is it that you like", "goodbye", ""])
    options = ["--model", str(tiny), "--budget", "48", "--max-new-tokens", "150"]
    cache = example("chat").main(options, read=lambda prompt: next(said))
    stats = cache.stats()
    printed = capsys.readouterr().out
    assert printed.count("model: ") == 3
    assert stats.seen > 48 + 128 + 60
    assert stats.compactions >= 2
    # A turn is read at once, and compacted afterwards.
    assert stats.peak_resident <= 48 + 128 + 60
    assert stats.resident <= 48 + 128


def test_a_document_beyond_the_trained_length(example, tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("once there was a boat, and then there was none. " * 10)
    options = ["--model", str(tiny), "--text", str(text), "--tokens", "300", "--chunk", "32", "--budget", "48"]
    found = example("long_document").main(options)
    assert list(found) == ["streaming-llm", "positions-stay"]
    turned, stays = found.values()
    assert len(turned) == len(stays) == 10
    assert turned[:2] == pytest.approx(stays[:2], abs=1e-4)  # nothing has been turned yet
    assert turned[-1] != pytest.approx(stays[-1], abs=1e-4)


def test_the_order_of_questions_does_not_matter(example, tiny, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the boat is red, and it goes far away in the morning. " * 4)
    options = ["--model", str(tiny), "--text", str(text), "--budget", "64", "--max-new-tokens", "12"]
    asked = ["where is it", "what is red", "and when"]
    script = example("many_questions")
    answers = script.main([*options, *(f"--question={each}" for each in asked)])
    assert "64 of 2" in capsys.readouterr().out
    other = script.main([*options, *(f"--question={each}" for each in reversed(asked))])
    assert len(answers) == 3
    assert other == answers[::-1]


def test_a_batch_scores_each_row_as_if_it_were_alone(example, tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n## ".join(["the boat is red and goes far away " * n for n in (2, 3, 5)]))
    script = example("batch_scoring")
    options = ["--model", str(tiny), "--text", str(text), "--budget", "40", "--last", "8"]
    found = script.main([*options, "--policy", "knorm"])
    assert all(each.shape == (3,) for each in found.values())
    assert not torch.allclose(found["knorm"], found["full"], atol=1e-4)
    same = script.main([*options, "--policy", "knorm", "--budget", "4000"])
    assert torch.allclose(same["knorm"], same["full"], atol=1e-5)
    import kvpolicy
    from kvpolicy.runtimes.opening import open_model, open_tokenizer

    model = open_model(tiny, "tiny", dtype="float32", device="cpu")
    tokenizer = open_tokenizer(tiny, "tiny")
    rows = [tokenizer(part)["input_ids"] for part in text.read_text().split("\n## ")]
    spec = kvpolicy.load("knorm", budget=40)
    alone = torch.cat([script.scores(model, [row], spec, 8) for row in rows])
    assert torch.allclose(alone, found["knorm"], atol=1e-4)


def test_a_vision_language_model(example):
    cache, share = example("vision").main([])
    assert cache.stats().compactions == 1
    assert len(cache.kept(0, 0)) == 40 + 7
    assert 0 < share < 1
    assert example("vision").main(["--by-modality"])[1] > 0


def _port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_ranks_write_what_one_process_writes(tmp_path):
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    script = str(FOLDER / "tensor_parallel.py")
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
              "--master-port", str(_port())]  # fmt: skip
    lines = []
    for command in ([], launch):
        done = subprocess.run(
            [sys.executable, "-P", *command, script, "--tokens", "40"],
            check=False, env=quiet, cwd=tmp_path, capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        lines.append([line for line in done.stdout.splitlines() if line.startswith("[")])
        held = [line for line in done.stdout.splitlines() if line.startswith("rank ")]
        assert len(held) == (2 if command else 1)
    assert lines[0] == lines[1]


def test_an_answer_is_streamed_as_it_comes(example, capsys):
    """The client, against a server that speaks as vLLM's does."""

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.path == "/v1/models"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"data": [{"id": "a/model"}]}).encode())

        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            for piece in ("Once", " there", " was"):
                data = json.dumps({"choices": [{"text": piece}]})
                self.wfile.write(f"data: {data}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, *arguments):
            pass

    asked = []
    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        script = example("serving")
        url = f"http://127.0.0.1:{server.server_port}"
        assert script.main(["--url", url, "--prompt", "Begin", "--tokens", "7"]) == "Once there was"
    finally:
        server.shutdown()
        server.server_close()
    assert asked[0]["prompt"] == "Begin"
    assert asked[0]["model"] == "a/model"  # by the name that the server gives it
    assert asked[0]["stream"] is True
    assert asked[0]["max_tokens"] == 7
    assert capsys.readouterr().out == "Once there was"
    command = script.command("folder", "rkv", 256, 8000)
    assert json.loads(command[-1]) == {"kvpolicy": {"policy": "rkv", "budget": 256}}


def test_a_server_that_ends_before_it_answers_ends_the_example_in_a_sentence(example):
    server = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    server.wait()
    with pytest.raises(SystemExit, match="has ended with 3; its last line above says why"):
        example("serving").wait_for("http://127.0.0.1:9", server)


@pytest.mark.vllm
@pytest.mark.timeout(3600)
def test_a_server_of_vllm_streams_under_a_policy(example):
    pytest.importorskip("vllm")
    answer = example("serving").main(
        ["--model", "reasoner", "--budget", "64", "--tokens", "300", "--port", str(_port())]
    )
    assert len(answer.split()) > 100
