from __future__ import annotations

import pytest

from kvpolicy.cli import main
from kvpolicy.study.spec import StudySpec
from kvpolicy.study.work import Outcome
from kvsupport.scripted import scripted_study

pytest.importorskip("scipy")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

SPEC = StudySpec(
    study="small",
    models=["nowhere"],
    datasets=[{"use": "needle", "words": 20, "chat": False}],
    axes={"policy": ["rkv", "random"]},
    conditions={"budget": [64], "trigger.interval": [16]},
    samples=3,
)


def script(task, item):
    return Outcome(None, {"exact": 1.0, "tokens": 50.0, "bytes_peak": 64.0}, "", (1, 2), 30)


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Return a function that makes a report in the folder of `small.yaml` and its results."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(SPEC.to_yaml())
    for name in ("small", "small-quick", "other"):
        scripted_study(SPEC, tmp_path / f"{name}.sqlite", script)

    def call(*arguments):
        code = main(["study", "report", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.mark.parametrize(
    ("arguments", "stem", "ran", "report"),
    [
        (("small.yaml",), "small", "run small.yaml", "report small.yaml"),
        (("small.yaml", "--quick"), "small-quick", "run small.yaml --quick", "report small.yaml --quick"),
        (
            ("small.yaml", "--out", "other.sqlite"),
            "other",
            "run small.yaml --out other.sqlite",
            "report small.yaml --out other.sqlite",
        ),
        (("other.sqlite",), "other", "run small.yaml --out other.sqlite", "report other.sqlite"),
    ],
)
def test_both_files_lie_beside_the_results_and_say_how_they_were_made(run, tmp_path, arguments, stem, ran, report):
    code, out, err = run(*arguments)
    assert (code, out) == (0, f"Written: {stem}.html and {stem}.md.\n"), err
    # The model of a study that is named is looked for, to say what it asks for now; a results file needs nothing.
    caution = "small.yaml: is taken as it ran last, for its models or data sets are not here (models: 'nowhere' cannot"
    assert err.startswith(caution) == (arguments[0] == "small.yaml")
    for suffix in (".html", ".md"):
        text = (tmp_path / f"{stem}{suffix}").read_text()
        assert f"kvpolicy study {ran}\nkvpolicy study {report}\n" in text.replace("</pre>", "\n")


def test_it_needs_the_results_file_alone(run, tmp_path):
    (tmp_path / "small.yaml").unlink()
    code, out, _ = run("small.sqlite", "--html", "a.html", "--markdown", "b b.md")
    assert (code, out) == (0, "Written: a.html and b b.md.\n")
    assert "report small.sqlite --html a.html --markdown 'b b.md'" in (tmp_path / "b b.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("smal",), "unknown study 'smal'."),
        (("none.sqlite",), "none.sqlite: there is no such file; run the study first"),
        (("small.sqlite", "--quick"), "--quick: small.sqlite is a results file already; leave --quick out."),
        (("small.sqlite", "--out", "x.sqlite"), "--out: small.sqlite is a results file already; leave --out out."),
        (("small.sqlite", "--html", "no/a.html"), "--html: no/a.html cannot be written (No such file or directory)"),
        (("small.sqlite", "--html", "small.sqlite"), "--html, --markdown: the page, the Markdown and the results need"),
    ],
)
def test_wrong_use_is_said_in_one_sentence(run, tmp_path, arguments, message):
    before = (tmp_path / "small.sqlite").read_bytes()
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert (tmp_path / "small.sqlite").read_bytes() == before
