import pytest

pytestmark = pytest.mark.browser


def test_x(page_at, tmp_path):
    (tmp_path / "a.html").write_text("<p>hello<script>console.log(1)</script>")
    o = page_at(tmp_path / "a.html")
    o.assert_fits()
    assert "hello" in o.page.content()
