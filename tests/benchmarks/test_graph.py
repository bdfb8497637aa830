"""What is compared: the same decoding in every lane, eager and as one graph, in one process."""

from __future__ import annotations

import torch


def test_every_lane_is_timed(measured, capsys):
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # what compiling makes is tested elsewhere
        (figures,) = measured("graph", "--quick")["figures"].values()
    assert list(figures["ms"]) == [
        "rkv, eager", "rkv, graph", "rkv, captured", "full, eager", "full, graph", "StaticCache, compiled",
        "StaticCache, captured",
    ]  # fmt: skip
    assert not figures["left_out"]
    assert all(each["median"] > 0 for each in figures["ms"].values())
    assert "eager / graph" in capsys.readouterr().out
