"""What the memory cgroups say they have left; their files are stood in for."""

import pytest

from gemini_gnn import cgroups

V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


@pytest.mark.parametrize(
    ("names", "limit", "used", "found"),
    [
        (V2, "1000000", "400000", 700000),
        (V2, "1000000", "1200000", 0),
        (V2, "max", "400000", None),
        (V2, "1000000", "", None),
        (V1, "1000000", "400000", 700000),
        (V1, "9223372036854771712", "400000", None),
    ],
)
def test_what_is_left_is_the_limit_without_what_cannot_be_given_back(tmp_path, monkeypatch, names, limit, used, found):
    for name, text in zip(names, (limit, used), strict=False):
        (tmp_path / name).write_text(text)
    (tmp_path / "memory.stat").write_text(f"anon 5\n{names[2]} 100000\n")
    monkeypatch.setattr(cgroups, "groups", lambda: [(tmp_path, names)])
    assert list(cgroups.left()) == ([] if found is None else [(tmp_path, found)])


def test_the_machine_has_some_left():
    assert 0 < (cgroups.machine_left() or 0) < 1 << 50
