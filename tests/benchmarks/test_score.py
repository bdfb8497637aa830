from __future__ import annotations

import pytest
import torch


def test_both_forms_agree_and_what_is_compared_is_reported(measured):
    report = measured("score", "--keys", 200, "--rounds", 2)
    (result,) = report["results"]
    part = result["redundancy"]
    assert len(part["layers"]) == 2
    assert part["largest_relative_difference"] < 1e-4
    assert part["key_bytes"] == {"one layer": 2 * 200 * 8 * 4, "all layers": 2 * 2 * 200 * 8 * 4}
    # At least the cosines in fp32, zeros and column numbers in int64, and the mask.
    assert part["peak_extra_bytes"]["released form"] >= 2 * 200 * 200 * (4 + 8 + 8 + 1)
    assert 0 < part["peak_extra_bytes"]["kvpolicy"] < part["peak_extra_bytes"]["released form"]
    compression = result["compression"]
    assert (compression["entries"], compression["kept"]) == (200, 72)
    assert len(compression["samples"]["compression"]) == 2
    assert min(s["wall"] for some in compression["samples"].values() for s in some) > 0


def test_the_released_form_is_checked_by_hand(script):
    score = script("score")
    keys = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.3], [0.2, 1.0]]])
    unit = keys[0] / keys[0].norm(dim=-1, keepdim=True)
    cosine = unit @ unit.T
    expected = torch.zeros(4)
    for column in range(4):
        for row in range(4):
            similar = [c for c in range(4) if c != row and cosine[row, c] > 0.5]
            cleared = max(similar, default=0)
            if row != column and column != cleared:
                expected[column] += cosine[row, column] / 4
    assert torch.allclose(score.released_redundancy(keys)[0], expected.softmax(-1), atol=1e-6)


@pytest.mark.parametrize("keys", ["120", "129"])
def test_too_few_keys_are_refused(script, keys):
    with pytest.raises(SystemExit, match=f"{keys} keys are too few for policy 'rkv', ask for more: budget"):
        script("score").main(["--keys", keys, "--rounds", "1"])


def test_a_broken_interpreter_for_kvpress_is_named(script, tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho no module named kvpress >&2\nexit 1\n")
    fake.chmod(0o755)
    with pytest.raises(SystemExit, match=r"python failed \(no module named kvpress\)"):
        script("score").main(["--keys", "200", "--rounds", "1", "--kvpress", str(fake)])
