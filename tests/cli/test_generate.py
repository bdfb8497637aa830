from __future__ import annotations

import io
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import kvpolicy
from kvpolicy.cli import main
from kvpolicy.cli.generated import Generation, table
from kvpolicy.cli.streaming import TextStream
from kvpolicy.runtimes.opening import encode

WORDS = [f"w{i}" for i in range(60)]
TEMPLATE = "{% for m in messages %}w1 w2 {{ m.content }} w3{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model with a tokenizer whose tokens are words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.5,
        pad_token_id=62,
        eos_token_id=None,
        bos_token_id=None,
    )
    path = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(path)
    words = {word: i for i, word in enumerate([*WORDS, "[UNK]", "[X]", "[PAD]", "[EOS]"])}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def policy(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(
        "schema_version: 1\npolicy: small\nextends: rkv\nbudget: 16\ntrigger: {every: 8}\nprotect: {recent: 4}\n"
        "importance: {observe: 4}\n"
    )
    return path


@pytest.fixture
def run(capsys, folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments):
        code = main(["generate", "--model", str(folder), "--device", "cpu", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def numbers(out):
    """Return the rows of the table: label -> cells."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line.startswith("│")]
    return {label: cells for label, *cells in rows}


def texts(out):
    """Return the text of each run by the name in its heading."""
    parts = re.split(r"^(\S+), .*? ─+$\n", out[: out.index("┏")], flags=re.MULTILINE)
    return dict(zip(parts[1::2], (part.strip() for part in parts[2::2]), strict=True))


def native(folder, prompt, new_tokens):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)[0, inputs.input_ids.shape[1] :]
    return tokenizer.decode(output, skip_special_tokens=True), len(output)


def test_two_runs_and_their_ratio(run, folder, policy):
    code, out, err = run("--policy", policy, "--compare", "full", "--max-new-tokens", 60, "--no-chat", "w5 w6 w7")
    assert (code, err) == (0, "")
    text, length = native(folder, "w5 w6 w7", 60)
    assert length == 60
    shown = texts(out)
    assert list(shown) == ["small", "full"]
    assert " ".join(shown["full"].split()) == " ".join(text.split())
    rows = numbers(out)
    seen = 3 + length - 1  # the last token is never fed back
    assert rows["new tokens"][1] == str(length)
    assert rows["tokens seen"][1] == str(seen)
    assert rows["KV entries per head, resident"][1] == str(seen)
    assert rows["KV entries per head, evicted"][1:] == ["0", ""]
    resident, evicted, peak, compactions = (
        int(rows[label][0])
        for label in (
            "KV entries per head, resident",
            "KV entries per head, evicted",
            "KV entries per head, peak",
            "compactions",
        )
    )
    assert 16 <= resident <= peak <= 24
    assert resident + evicted == int(rows["tokens seen"][0])
    assert compactions == evicted // 8 > 1
    # 2 layers, 2 heads, keys and values, 8 numbers of 4 bytes
    assert rows["KV bytes resident"][0] == f"{resident * 2 * 2 * 2 * 8 * 4 / 2**20:,.2f} MiB"
    assert float(rows["KV entries per head, peak"][2]) == pytest.approx(peak / seen, abs=0.006)


def test_budget_option_and_chat_template(run, policy):
    code, out, _ = run("--policy", policy, "--budget", "12", "--max-new-tokens", 30, "w5")
    assert code == 0
    assert "small, budget 12" in out
    rows = numbers(out)
    assert int(rows["KV entries per head, peak"][0]) <= 20
    assert int(rows["tokens seen"][0]) == 4 + int(rows["new tokens"][0]) - 1  # the template adds three words
    assert len(rows["tokens/s"]) == 1
    assert (
        "small, keeps 0.5 of the tokens" in run("--policy", policy, "--budget", "0.5", "--max-new-tokens", 3, "w5")[1]
    )


def test_sampling_is_seeded(run, policy):
    def text(*options):
        return texts(run("--policy", policy, "--max-new-tokens", 20, *options, "w5 w6")[1])["small"]

    assert text("--seed", 1, "--temperature", 1.5) == text("--seed", 1, "--temperature", 1.5)
    assert text("--seed", 1, "--temperature", 1.5) != text("--seed", 2, "--temperature", 1.5)
    assert text() == text()


def test_prompt_from_standard_input(run, policy, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("w5 w6 w7 w8"))
    code, out, _ = run("--policy", policy, "--max-new-tokens", 3, "--no-chat", "-")
    assert code == 0
    assert int(numbers(out)["tokens seen"][0]) == 4 + int(numbers(out)["new tokens"][0]) - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "rkw", "x"], "error: unknown policy 'rkw'. Did you mean 'rkv'?"),
        (["--compare", "ful", "x"], "error: unknown policy 'ful'. Did you mean 'full'?"),
        (["--budget", "5", "x"], "error: budget: 5 entries are fewer than the 12 that are protected"),
        (["--budget", "0", "x"], "error: budget.tokens: 0 is no budget"),
        (["--budget", "1.5", "x"], "error: budget.fraction: should be above 0 and at most 1, got 1.5"),
        (["--budget", "nan", "x"], "error: budget: NaN is not a number"),
        (
            ["--budget", "many", "x"],
            "error: --budget: 'many' is not a number; write 256 for entries or 0.1 for a share.",
        ),
        (["--temperature", "0", "x"], "error: --temperature: 0 should be from 0.0001"),
        (["--top-p", "1.5", "x"], "error: --top-p: should be above 0 and at most 1, got 1.5."),
        (["--dtype", "int8", "x"], "error: --dtype: 'int8' is not one of auto, float32, bfloat16, float16."),
        (["--device", "gpu", "x"], "error: --device: 'gpu' cannot be used:"),
        ([" "], "error: PROMPT is empty"),
        (
            ["--no-chat", "w1 " * 256],
            "error: PROMPT: makes a text of 256 tokens, and the model has 256 positions",
        ),
        (["--no-chat", "w1 " * 2000], "error: PROMPT: makes a text of more than 256 tokens, and the model has 256"),
        (
            ["--max-new-tokens", "2", "w1 " * 252],
            "error: --max-new-tokens: behind 255 tokens of text there is room",
        ),
    ],
)
def test_wrong_options_are_one_sentence(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_models_that_cannot_be_loaded(capsys, tmp_path):
    def error(model):
        assert main(["generate", "--model", str(model), "x"]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    assert (
        error(tmp_path / "gone")
        == f"error: --model: there is no folder '{tmp_path}/gone'; give a model folder or a hub id.\n"
    )
    assert error(tmp_path).startswith(f"error: --model: '{tmp_path}' cannot be loaded: ")
    (tmp_path / "config.json").write_text("{")
    assert error(tmp_path).startswith(f"error: --model: '{tmp_path}' cannot be loaded: ")
    assert error("nobody/nothing").startswith("error: --model: 'nobody/nothing' cannot be loaded: ")


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["generate", "--model", "nope/none", "x"], "--model: there is no folder 'nope/none'"),
        (["trace", "--model", "nope/none", "x"], "--model: there is no folder 'nope/none'"),
        (
            ["calibrate", "qfilter", "--model", "nope/none", "--text", "t.txt", "--out", "x.safetensors"],
            "--model: there is no folder 'nope/none'",
        ),
        (["explain", "rkv", "--model-config", "no/ne"], "--model-config: there is no file or folder 'no/ne'"),
    ],
)
def test_the_hub_is_named_before_it_is_asked(capsys, tmp_path, monkeypatch, arguments, option):
    import transformers
    from huggingface_hub import constants

    said = []

    def ask(*_args, **_kwargs):
        said.append(capsys.readouterr().err)
        raise OSError("no answer.")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("words")
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", ask)
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        assert main(arguments) == 1
        assert "no answer" in capsys.readouterr().err
    online, without = said
    assert " ".join(online.split()).startswith(f"{option}; asking the Hugging Face hub, which takes a minute")
    assert without == ""


def test_without_transformers(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run("x") == (1, "", "error: generate needs transformers; install it with: pip install 'kvpolicy[hf]'.\n")


def test_the_model_is_given_back_when_the_user_interrupts(run, policy, monkeypatch):
    def interrupt(self, value):
        raise KeyboardInterrupt

    monkeypatch.setattr(TextStream, "put", interrupt)
    code, out, err = run("--policy", policy, "w5")
    assert code == 130
    assert "Traceback" not in out + err


def test_chat_needs_a_template():
    with pytest.raises(kvpolicy.KVPolicyError, match="has no chat template"):
        encode(SimpleNamespace(chat_template=None), "x", chat=True)


class Characters:
    """A tokenizer whose tokens are characters."""

    def decode(self, tokens, **_):
        return "".join(chr(int(t)) for t in tokens)


STATS = SimpleNamespace(resident=17, evicted=5)
SAYING = "It is a truth universally acknowledged,\n\nthat a\nwordthatfillsmorethanawholelinebyitself must wrap.\n"


def stream(text, console):
    with TextStream(Characters(), console, SimpleNamespace(stats=lambda: STATS)) as target:
        target.put(torch.tensor([[1, 2, 3]]))
        for character in text:
            target.put(torch.tensor([ord(character)]))
        target.end()
    return target


def test_stream_into_a_file_is_the_text():
    out = io.StringIO()
    target = stream(SAYING, Console(file=out, width=20))
    assert out.getvalue() == SAYING
    assert target.tokens == len(SAYING)


def test_stream_on_a_terminal_keeps_every_word_and_shows_progress(monkeypatch):
    monkeypatch.setattr("kvpolicy.cli.streaming._REFRESH_SECONDS", 0.0)
    out = io.StringIO()
    stream(SAYING, Console(file=out, width=30, height=10, force_terminal=True, legacy_windows=False))
    screen = Screen(30)
    screen.feed(out.getvalue())
    # What stays on the screen is the text; the progress line is gone.
    assert "".join("".join(screen.lines).split()) == "".join(SAYING.split())
    assert "17 entries" in re.sub(r"\s+", " ", out.getvalue())


class Screen:
    """As much of a terminal as rich's live display uses: text, line feeds, cursor up, erase line."""

    def __init__(self, width):
        self.width, self.lines, self.row, self.column = width, [""], 0, 0

    def feed(self, text):
        for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
            if token == "\n":
                self.row, self.column = self.row + 1, 0
                if self.row == len(self.lines):
                    self.lines.append("")
            elif token == "\r":
                self.column = 0
            elif token.startswith("\x1b["):
                count = int(re.sub(r"\D", "", token) or 1)
                if token.endswith("A"):
                    self.row -= count
                elif token.endswith("K"):
                    self.lines[self.row] = ""
            else:
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + token + line[self.column + len(token) :]
                self.column += len(token)


def test_table_of_one_run_has_no_ratio():
    stats = SimpleNamespace(
        seen=10,
        resident=8,
        peak_resident=9,
        evicted=2,
        bytes_resident=2**20,
        bytes_peak=2**20,
        bytes_allocated=2**21,
        compactions=1,
    )
    out = io.StringIO()
    Console(file=out, width=80).print(table([Generation("p", 5, 2.0, stats)]))
    rows = numbers(out.getvalue())
    assert rows["tokens/s"] == ["2.5"]
    assert rows["KV bytes allocated"] == ["2.00 MiB"]


def test_a_policy_that_did_nothing_says_so(run, policy):
    quiet = run("w5 w6 w7", "--policy", policy, "--max-new-tokens", "8", "--compare", "full")[1]
    sentence = "small: nothing was compacted, for 13 tokens do not exceed the 24 entries that it may hold; this was the"
    assert sentence in " ".join(quiet.split())
    assert quiet.count("nothing was compacted") == 1
    assert "nothing was compacted" not in run("w5 w6 w7", "--policy", policy, "--max-new-tokens", "40")[1]
    prompt_only = run("w5 w6 w7", "--policy", "snapkv-prefill", "--max-new-tokens", "8")[1]
    assert "the prompt is too short for it" in " ".join(prompt_only.split())


def test_a_short_text_does_not_take_the_whole_bound(run):
    rows = numbers(run("w5 w6 w7", "--policy", "rkv", "--compare", "full", "--max-new-tokens", "8")[1])
    allocated, full = (float(cell.split()[0]) for cell in rows["KV bytes allocated"][:2])
    assert allocated <= full + 0.1  # of 1,152 entries it would be 0.56 MiB
