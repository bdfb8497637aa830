from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import pytest
import torch
from safetensors.torch import save_file

import kvpolicy
from kvpolicy import Catalog, ImportanceScorer, PluginError, PolicySpec, SpecError, UnknownComponentError
from kvpolicy.contracts.view import CacheView
from kvpolicy.errors import TableError
from kvpolicy.loading import installed
from kvpolicy.loading.entries import Origin
from kvpolicy.tables import KINDS, Table, TableOf, check_fit, load_table, registered, save_table
from kvpolicy.testing import check_component
from kvpolicy.testing.tables import stand_in_tables

L, H, D, G, F = 3, 2, 8, 2, 4


def tensors(kind):
    torch.manual_seed(0)
    if kind == "head_scores":
        return {"scores": torch.rand(L, H)}
    if kind == "query_filters":
        return {"filters": torch.randn(L, H, D)}
    if kind == "query_frequencies":
        return {"mean": torch.randn(L, H, G, F, 2), "magnitude": torch.rand(L, H, G, F)}
    if kind == "gates":
        return {"output_weight": torch.randn(L, H, 6), "output_bias": torch.randn(L, H)}
    kept = torch.tensor([0.25, 0.5])[:, None, None] + 0.1 * torch.tensor([1.0, -1.0]).expand(2, L, H)
    return {"fractions": torch.tensor([0.25, 0.5]), "kept": kept}


def table(kind="head_scores", **changes):
    given = {"kind": kind, "model": "tiny", "method": "a-method", "num_layers": L, "num_kv_heads": H, "head_dim": D}
    return Table(**{**given, "tensors": tensors(kind), "command": "kvpolicy calibrate a-method", **changes})


def view(layers=L, heads=H, dim=D, layer=1):
    one = torch.ones(1, dtype=torch.int64)
    positions = torch.arange(5, dtype=torch.int32).expand(1, heads, 5)
    keys = torch.randn(1, heads, 5, dim, generator=torch.Generator().manual_seed(1))
    return CacheView(
        keys=keys,
        values=keys,
        positions=positions,
        valid=torch.ones(1, heads, 5, dtype=torch.bool),
        scale=1.0,
        layer_idx=layer,
        num_layers=layers,
        prompt_length=one,
        seen=one * 5,
        compaction=one * 0,
    )


class Along(ImportanceScorer):
    """Scores keys along a filter."""

    table: Annotated[str, TableOf("query_filters")]
    """The table."""

    def score(self, view):
        filters = load_table(self.table, "query_filters").layer("filters", view)
        return torch.einsum("bhnd,hd->bhn", view.keys.float(), filters)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_table_comes_back_as_it_was_written(tmp_path, kind, dtype):
    made = table(kind, notes={"text": "a.txt", "output": "score"})
    path = tmp_path / "it.safetensors"
    save_table(made, path, dtype)
    back = load_table(path, kind)
    assert load_table(str(path), kind) is back
    for name, tensor in made.tensors.items():
        assert back.tensors[name].dtype == torch.float32
        assert torch.equal(back.tensors[name], tensor.to(dtype).float())
    for name in ("kind", "model", "method", "command", "num_layers", "num_kv_heads", "head_dim", "notes"):
        assert getattr(back, name) == getattr(made, name)
    assert back.source == str(path)


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "it.safetensors"
    save_table(table(), path)
    first = load_table(path, "head_scores")
    save_table(table(tensors={"scores": torch.arange(6.0).reshape(L, H)}), path)
    os.utime(path, ns=(1, 1))
    second = load_table(path, "head_scores")
    assert second is not first
    assert second.tensors["scores"][2, 1] == 5


@pytest.mark.parametrize("settled", [True, False])
def test_a_file_that_changed_under_the_same_size_and_time_is_read_again(tmp_path, settled, monkeypatch):
    if settled:  # as if it had been written long ago
        monkeypatch.setattr("kvpolicy.tables.files._SETTLED_NS", -(10**18))
    path = tmp_path / "it.safetensors"
    for number in range(20):  # within one tick of the file system's clock, too
        scores = torch.tensor([[0.0, number + 1.0], [2, 3], [4, 5]])
        save_table(table(tensors={"scores": scores}), tmp_path / "new.safetensors")
        if settled or number % 2:
            (tmp_path / "new.safetensors").replace(path)
        else:
            path.write_bytes((tmp_path / "new.safetensors").read_bytes())  # the same file with another content
        os.utime(path, ns=(10**18, 10**18))
        found = load_table(path, "head_scores")
        assert torch.equal(found.tensors["scores"], scores)
        assert load_table(path, "head_scores") is found


SAME = torch.tensor([0.2, 0.4])[:, None, None].expand(2, L, H)
ONE_WITHOUT = torch.eye(L * H, D).reshape(L, H, D) * torch.tensor([0.0, 1.0])[:, None]
BAD = {
    "uniform": ({"tensors": {"scores": torch.full((L, H), 0.5)}}, "is uniform"),
    "zero": ({"tensors": {"scores": torch.zeros(L, H)}}, "is uniform"),
    "NaN": ({"tensors": {"scores": torch.full((L, H), float("nan"))}}, "scores holds NaN"),
    "negative": ({"tensors": {"scores": -torch.rand(L, H)}}, "scores holds negative numbers"),
    "integers": ({"tensors": {"scores": torch.arange(6).reshape(L, H)}}, "scores should be floating-point numbers"),
    "another shape": ({"tensors": {"scores": torch.rand(L, H + 1)}}, r"\[L H\] with H = 2, got float32 \[3, 3\]"),
    "another axis": ({"tensors": {"scores": torch.rand(L, H, 1)}}, r"\[L H\], got float32 \[3, 2, 1\]"),
    "another tensor": ({"tensors": {"score": torch.rand(L, H)}}, "has the tensors score; a head_scores has scores"),
    "unknown kind": ({"kind": "heads"}, "'heads' is not a kind of table; the kinds are head_scores"),
    "one filter for all": (
        {"kind": "query_filters", "tensors": {"filters": torch.ones(L, H, D)}},
        "is uniform",
    ),
    "no direction": (
        {"kind": "query_filters", "tensors": {"filters": ONE_WITHOUT}},
        "filter of zeros",
    ),
    "one curve for all": (
        {"kind": "head_curves", "tensors": {"fractions": torch.tensor([0.2, 0.4]), "kept": SAME}},
        "is uniform",
    ),
    "a curve that falls": (
        {"kind": "head_curves", "tensors": {**tensors("head_curves"), "fractions": torch.tensor([0.5, 0.25])}},
        "fractions should rise",
    ),
    "a curve with another mean": (
        {"kind": "head_curves", "tensors": {**tensors("head_curves"), "fractions": torch.tensor([0.25, 0.6])}},
        "fractions its mean",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_says_nothing_or_makes_no_sense_is_refused(case):
    changes, message = BAD[case]
    with pytest.raises(TableError, match=message) as caught:
        table(**changes)
    assert str(caught.value).startswith("table 'a-method': ")
    assert "\n" not in str(caught.value)


def test_a_model_of_one_head_may_have_one_number():
    one = table(num_layers=1, num_kv_heads=1, tensors={"scores": torch.ones(1, 1)})
    assert one.tensors["scores"].shape == (1, 1)


def test_files_that_are_no_tables_are_refused_by_name(tmp_path):
    path = tmp_path / "it.safetensors"
    with pytest.raises(TableError, match="there is no such file; make it with"):
        load_table(path, "head_scores")
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(TableError, match="is not a readable safetensors file"):
        load_table(path, "head_scores")
    save_file({"scores": torch.rand(L, H)}, path)
    with pytest.raises(TableError, match="is not a table of kvpolicy"):
        load_table(path, "head_scores")
    save_file({"scores": torch.rand(L, H)}, path, metadata={"kvpolicy_table": "2"})
    with pytest.raises(TableError, match="has format version '2' and this kvpolicy reads 1"):
        load_table(path, "head_scores")
    save_file({"scores": torch.rand(L, H)}, path, metadata={"kvpolicy_table": "1", "kind": "head_scores"})
    with pytest.raises(TableError, match="its metadata are damaged"):
        load_table(path, "head_scores")
    with pytest.raises(TableError, match="is a directory; give one table"):
        load_table(tmp_path, "head_scores")
    with pytest.raises(TableError, match="is not an ordinary file; give a table"):
        load_table(Path("/dev/zero"), "head_scores")
    with pytest.raises(TableError, match="there is no such file"):
        load_table("~nosuch/it.safetensors", "head_scores")


def test_a_table_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "it.safetensors"
    save_table(table(), path)
    with pytest.raises(TableError, match=r"is of kind 'head_scores'.*'query_filters' is needed here"):
        load_table(path, "query_filters")


@pytest.mark.parametrize("shape", [{"layers": L + 1}, {"heads": H + 1}, {"dim": D + 2}])
def test_a_table_of_another_model_is_refused_at_first_use_and_by_check_fit(tmp_path, shape):
    path = tmp_path / "it.safetensors"
    save_table(table("query_filters"), path)
    scorer = Along(table=str(path))
    assert scorer.score(view()).shape == (1, H, 5)
    with pytest.raises(TableError, match=r"was measured on tiny .*3, 2, 8.* does not fit a model of"):
        scorer.score(view(**shape))
    sizes = {"layers": L, "heads": H, "dim": D, **shape}
    check_fit([scorer], L, H, D)
    with pytest.raises(TableError, match="does not fit"):
        check_fit([scorer], sizes["layers"], sizes["heads"], sizes["dim"])


def test_layers_and_rows_are_the_numbers_of_the_file():
    made = table("query_filters")
    assert torch.equal(made.layer("filters", view(layer=2)), made.tensors["filters"][2])
    scores = table()
    rows = scores.rows("scores", [2, 0], L, H, torch.device("cpu"))
    assert torch.equal(rows, scores.tensors["scores"][[2, 0]])
    curves = table("head_curves")
    assert torch.equal(curves.rows("kept", [1], L, H, torch.device("cpu")), curves.tensors["kept"][:, 1:2])


@pytest.fixture
def named(tmp_path):
    """Return a catalog with a table and a component that reads one."""
    path = tmp_path / "filters.safetensors"
    save_table(table("query_filters"), path)
    save_table(table(), tmp_path / "scores.safetensors")
    catalog = installed.load_catalog()
    catalog.register("along", Along)
    catalog.register_table("tiny/filters", path)
    catalog.register_table("tiny/scores", tmp_path / "scores.safetensors")
    with installed.using(catalog):
        yield path


FILE = """\
schema_version: 1
policy: mine
budget: 64
trigger: {every: 8}
importance: {use: along, table: NAME}
"""


def test_a_specification_names_a_table(named):
    spec = PolicySpec.from_yaml(FILE.replace("NAME", "tiny/filters"))
    assert spec.importance.params == {"table": "tiny/filters"}
    assert PolicySpec.from_yaml(spec.to_yaml()) == spec
    assert torch.isfinite(spec.build().retention(view())).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny/filter", "unknown table 'tiny/filter'. Did you mean 'tiny/filters'?"),
        ("tiny/scores", "is of kind 'head_scores'"),
        ("none.safetensors", "table 'none.safetensors': there is no such file"),
    ],
)
def test_a_specification_with_a_wrong_table_is_refused_where_it_stands(named, name, message):
    with pytest.raises(SpecError) as caught:
        PolicySpec.from_yaml(FILE.replace("NAME", name), "mine.yaml")
    assert str(caught.value).startswith("mine.yaml:5:")
    assert f"importance.table: {message}" in str(caught.value) or message in str(caught.value)
    assert str(caught.value).endswith(".")


def test_a_table_that_turned_uniform_is_refused_when_the_policy_is_loaded(named):
    metadata = {"kvpolicy_table": "1", "kind": "query_filters", "model": "tiny", "method": "m", "command": ""}
    metadata |= {"num_layers": str(L), "num_kv_heads": str(H), "head_dim": str(D)}
    save_file({"filters": torch.ones(L, H, D)}, named, metadata=metadata)
    with pytest.raises(SpecError, match=r"mine\.yaml:5:26: importance\.table: .*is uniform"):
        PolicySpec.from_yaml(FILE.replace("NAME", "tiny/filters"), "mine.yaml")


def test_the_json_schema_offers_the_installed_tables_of_the_kind(named):
    names = Along.model_json_schema()["properties"]["table"]["examples"]
    assert "tiny/filters" in names
    assert "tiny/scores" not in names


def test_names_and_files_of_tables_are_checked(named):
    catalog = Catalog()
    with pytest.raises(PluginError, match="'filters' is not the name of a table; write model/method"):
        catalog.register_table("filters", named)
    with pytest.raises(PluginError, match=r"table 'a/b': there is no file '/not/there'"):
        catalog.register_table("a/b", "/not/there")
    with pytest.raises(PluginError, match="table 'a/b': 7 is not a path"):
        catalog.register_table("a/b", 7)
    catalog.register_table("a/b", named, Origin("one", plugin="one-plugin"))
    with pytest.raises(PluginError, match="table 'a/b' is registered by one"):
        catalog.register_table("a/b", named, Origin("two", plugin="two-plugin"))
    catalog.unregister("table", "a/b")
    assert catalog.tables() == []
    with installed.using(catalog), pytest.raises(UnknownComponentError, match="No table is registered"):
        load_table("a/b", "query_filters")


def test_a_file_is_written_only_where_it_can_be_read(tmp_path):
    with pytest.raises(TableError, match=r"ends in \.safetensors"):
        save_table(table(), tmp_path / "it.bin")
    with pytest.raises(TableError, match="cannot be written"):
        save_table(table(), tmp_path / "none" / "it.safetensors")


def test_a_parameter_cannot_ask_for_an_unknown_kind():
    with pytest.raises(ValueError, match="not a kind of table"):
        TableOf("heads")


class OneForAll(Along):
    """Breaks a law: its scores depend on the row's place in the batch."""

    def score(self, view):
        return super().score(view) + torch.arange(view.shape[0]).view(-1, 1, 1)


def test_laws_try_components_with_tables_of_any_shape():
    held = {r.law: r for r in check_component(Along)}
    assert all(r.status != "failed" or "head" in r.law for r in held.values()), held
    broken = [r for r in check_component(OneForAll) if r.status == "failed" and "head" not in r.law]
    assert broken
    assert any("with stand_in_tables():" in r.failure.test for r in broken if r.failure.test)


def test_stand_ins_are_sound_curves_and_frequencies():
    with stand_in_tables():
        curves = load_table("any", "head_curves")
        kept = curves.rows("kept", range(4), 4, 3, torch.device("cpu"))
        assert torch.allclose(kept.mean((1, 2)), curves.tensors["fractions"])
        assert kept.min() >= 0
        assert kept.max() <= 1
        frequencies = load_table("any", "query_frequencies")
        mean, magnitude = frequencies.layer("mean", view()), frequencies.layer("magnitude", view())
        assert (mean.norm(dim=-1) <= magnitude).all()
        assert torch.equal(mean, frequencies.layer("mean", view(layers=9)))


def test_every_installed_table_is_sound_and_says_how_it_was_made():
    found = dict(registered())
    folder = Path(kvpolicy.catalog().policy("rkv").path).parents[1] / "tables"
    assert sorted(found) == sorted(f"{p.parent.name}/{p.stem}" for p in folder.glob("*/*.safetensors"))
    for name, made in found.items():
        assert isinstance(made, Table), made
        assert made.method == name.split("/")[1]
        assert made.command.startswith(f"kvpolicy calibrate {made.method} ")
        assert Path(made.source).stat().st_size < 1 << 20
