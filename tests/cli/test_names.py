"""`list`, `show` and `validate` know everything that is registered, and lead from other names to what is meant."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

import kvpolicy
from kvpolicy.cli import main
from kvpolicy.loading import installed
from kvpolicy.loading.entries import KINDS_OF_ENTRIES, Origin

CATALOG = kvpolicy.catalog()
ONE_OF_EACH = [next(entry for entry in CATALOG if entry.kind == kind) for kind in KINDS_OF_ENTRIES]

STUDY = """\
schema_version: 1
kind: study
study: mine
base: rkv
axes: {budget: [64, 128]}
models: [smollm2]
datasets: [gsm8k]
"""


def listed(run, *arguments):
    code, out, err = run("list", "--json", *arguments)
    assert (code, err) == (0, "")
    return {(entry["kind"], entry["name"]): entry for entry in json.loads(out)["entries"]}


# -- list -------------------------------------------------------------------------------------------------------------


def test_list_says_when_a_policy_runs(run):
    entries = listed(run)
    assert {name: entries["policy", name]["runs"] for name in ("rkv", "snapkv-prefill", "h2o", "full")} == {
        "rkv": "decode",
        "snapkv-prefill": "prefill",
        "h2o": "both",
        "full": "never",
    }
    assert "runs" in run("list")[1].splitlines()[0].split()


def test_list_has_every_kind_of_thing_that_can_be_registered(run):
    entries = listed(run)
    assert {kind for kind, _ in entries} == set(KINDS_OF_ENTRIES)
    assert entries["backend", "triton"]["summary"].startswith("Kernels for CUDA and HIP devices")
    assert entries["backend", "triton"]["plugin"] == "builtin-kernels"
    assert set(listed(run, "--kind", "backend")) == {("backend", name) for name in CATALOG.backends()}


def test_list_can_be_filtered(run):
    everything = listed(run)
    prefill = listed(run, "--runs", "prefill")
    assert {kind for kind, _ in prefill} == {"policy"}
    assert set(prefill) == {key for key, entry in everything.items() if entry.get("runs") in ("prefill", "both")}
    assert {kind for kind, _ in listed(run, "density")} == {"policy", "redundancy", "study"}
    assert ("policy", "rkv-density") in listed(run, "R-KV", "Density")
    assert listed(run, "--package", "kvpolicy") == everything
    assert listed(run, "--package", "nobody") == {}
    assert run("list", "nothing-is-called-so")[1].startswith("Nothing that is registered fits")
    assert run("list", "--runs", "decoding")[2].startswith(
        "error: --runs: 'decoding' is not a phase. Did you mean 'decode'?"
    )
    assert run("list", "--runs", "decode", "--kind", "mixer")[0] == 1


def test_a_list_in_which_nothing_fits_leads_to_what_was_probably_meant(run):
    code, out, _ = run("list", "SnapKVPress")
    assert (code, out.splitlines()[-1]) == (
        0,
        "For kvpress's SnapKVPress take the policy 'snapkv-prefill' (docs/from-kvpress.md).",
    )
    both = " ".join(run("list", "PyramidKVPress", "DecodingPress", "--kind", "policy")[1].split())
    assert "take the policy 'pyramidkv'" in both
    assert "For kvpress's DecodingPress write `phase: decode`" in both
    assert len(run("list", "nothing-is-called-so")[1].splitlines()) == 1
    assert "'kvpress' runs scorers" in run("list", "kvpress")[1] or find_spec("kvpress") is not None
    assert run("list", "snapvk")[1].splitlines()[-1] == "'snapvk': Did you mean 'snapkv'?"
    assert run("list", "rkv", "--kind", "mixer")[1].splitlines()[-1] == "'rkv': That is the name of a policy."
    assert "\x1b" not in run("list", "snapkv\x1b[2J")[1]
    assert json.loads(run("list", "SnapKVPress", "--json")[1])["entries"] == []


def test_a_list_names_packages_where_there_are_several(run):
    catalog = installed.load_catalog()
    assert "All from kvpolicy" in run("list")[1]
    catalog.register_study("mine", STUDY, Origin("other", "2"))
    with installed.using(catalog):
        assert "other 2" in run("list", "--kind", "study")[1]
        assert set(listed(run, "--package", "Other")) == {("study", "mine")}


# -- show -------------------------------------------------------------------------------------------------------------


def test_show_says_of_a_study_what_its_datasets_say_in_its_place(run):
    out = " ".join(run("show", "ruler-4k")[1].split())
    assert "ruler-4k (5,500 problems, max_new_tokens 128); ruler-4k-qa (1,000 problems, max_new_tokens 128)" in out
    assert "compress=context; budget=0.75, compress=prompt; budget=0.5" in out
    assert "seeds 0 sampling" in out
    out = " ".join(run("show", "reasoning-4x")[1].split())
    assert "math-500 (500 problems, 2 rollouts, budget 1,024); gpqa-diamond (198 problems, 4 rollouts" in out
    assert "seeds" not in out


@pytest.mark.parametrize("entry", ONE_OF_EACH, ids=[entry.kind for entry in ONE_OF_EACH])
def test_show_knows_everything_that_list_prints(run, entry):
    code, out, err = run("show", f"{entry.kind}.{entry.name}")
    assert (code, err) == (0, "")
    assert out.startswith(entry.name)


def test_a_component_is_shown_with_parameters_paper_and_its_users(run):
    out = run("show", "key_cosine")[1]
    assert "arXiv:2505.24133" in out
    used = next(line for line in out.splitlines() if line.startswith("used by")).removeprefix("used by").split(", ")
    assert {name.strip() for name in used} >= {"rkv", "g-kv", "rkv-pinned"}
    row = next(line for line in out.splitlines() if line.startswith("threshold")).split("  ")
    assert [cell.strip() for cell in row if cell.strip()] == [
        "threshold",
        "0.5",
        "number >= 0, <= 1",
        "Cosine above which two keys count as similar.",
    ]
    # A part of another component counts, too.
    assert "rkv-density" in run("show", "window_attention")[1]


def test_a_name_that_means_several_things_shows_all_of_them(run):
    both = run("show", "none")[1]
    assert "none  an importance" in both
    assert "none  a redundancy" in both
    assert "an importance" not in run("show", "redundancy.none")[1]
    both = run("show", "rkv-density")[1]
    assert "policy: rkv-density" in both
    assert "rkv-density  a study" in both


def test_a_variant_says_what_it_extends_and_claims_no_paper(run, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("schema_version: 1\npolicy: mine\nextends: rkv\nmixer: {weight: 0.3}\n")
    out = run("show", file)[1]
    assert "extends: rkv (arXiv:2505.24133)" in out
    assert "departures" not in out
    assert "paper:" not in out


@pytest.mark.parametrize(
    ("name", "lead"),
    [
        ("mixkv-mixer", "error: 'mixkv-mixer' is no name; the mixer of policy 'mixkv' is 'head_adaptive': write mixer"),
        ("key_cosin", "error: unknown policy 'key_cosin'. Did you mean the redundancy 'key_cosine'?"),
        ("rkv-lamda", "error: unknown policy 'rkv-lamda'. Did you mean the study 'rkv-lambda'?"),
        ("rkw", "error: unknown policy 'rkw'. Did you mean 'rkv'?"),
    ],
)  # fmt: skip
def test_show_leads_to_what_is_meant(run, name, lead):
    code, out, err = run("show", name)
    assert (code, out) == (1, "")
    assert err.startswith(lead)


# -- validate ---------------------------------------------------------------------------------------------------------


def test_validate_knows_studies_and_names(run, tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(STUDY)
    assert run("validate", file) == (0, f"{file}: study mine is valid.\n", "")
    assert run("validate", "rkv") == (0, "rkv: policy rkv is valid.\n", "")
    assert run("validate", "smollm2-135m/headkv")[1] == "smollm2-135m/headkv: table smollm2-135m/headkv is valid.\n"
    lines = run("validate", "rkv-density")[1].splitlines()
    assert lines == ["rkv-density: policy rkv-density is valid.", "rkv-density: study rkv-density is valid."]
    code, out, err = run("validate", "key_cosine", "rkw")
    assert (code, out) == (1, "")
    assert err.startswith("key_cosine: is a redundancy, which has no file; `kvpolicy show key_cosine`")
    assert err.splitlines()[1].startswith("unknown policy 'rkw'. Did you mean 'rkv'?")


def test_validate_prints_every_mistake_on_a_line(run, tmp_path):
    study, policy = tmp_path / "study.yaml", tmp_path / "policy.yaml"
    study.write_text(STUDY.replace("base: rkv", "base: rvk").replace("gsm8k", "gsm9k"))
    policy.write_text("schema_version: 1\npolicy: p\nbudget: 0\ntrigger: 64\nimportance: key_norms\n")
    code, out, err = run("validate", study, policy)
    assert (code, out) == (1, "")
    places = [line.removeprefix(f"{tmp_path}/").split(": ")[:2] for line in err.splitlines()]
    assert places == [
        ["study.yaml:4:1", "base"],
        ["study.yaml:7:12", "datasets.0"],
        ["policy.yaml:3:1", "budget.tokens"],
        ["policy.yaml:4:1", "trigger"],
        ["policy.yaml:5:1", "importance"],
    ]


@pytest.mark.parametrize("head", ["kind: studie\n", "study: mine\n"])
def test_a_file_that_nearly_is_a_study_is_read_as_one(run, tmp_path, head):
    file = tmp_path / "study.yaml"
    file.write_text(f"schema_version: 1\n{head}")
    assert "a study file says `kind: study`" in run("validate", file)[2]


@pytest.mark.parametrize("command", ["show", "validate", "explain", "check"])
def test_the_home_of_nobody_is_no_file(command, capsys):
    assert main([command, "~nosuch/x.yaml"]) == 1
    said = capsys.readouterr().err
    assert "~nosuch/x.yaml: there is no such file." in said
    assert said.count("\n") == 1


def test_paths_are_written_out_in_one_place():
    """`Path.expanduser` raises RuntimeError for the home of a user that there is not."""
    package = Path(kvpolicy.__file__).parent
    users = [path.name for path in package.rglob("*.py") if ".expanduser(" in path.read_text(encoding="utf-8")]
    assert users == ["inputs.py"]
