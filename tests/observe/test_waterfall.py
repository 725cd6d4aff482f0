"""The picture of a run's failures: what is drawn is pure, and the drawing writes a file."""

import json

import pytest
from matplotlib.image import imread

from gemini_gnn.errors import RunDirError
from gemini_gnn.observe import waterfall
from gemini_gnn.observe.waterfall import Bar

KILLED = {
    "kind": "killed",
    "rank": 1,
    "machine": "h1",
    "step": 20,
    "recovery_s": 0.75,
    "interrupted": False,
    "parts": {"detect_s": 0.25, "decide_s": 0.125, "first_step_s": 0.375},
    "time": 1000.0,
}
ROOT = {key: value for key, value in KILLED.items() if key != "rank"} | {"kind": "root agent", "interrupted": True}


def test_a_bar_for_each_failure_in_the_order_of_its_parts():
    parts = (("detect", 0.25), ("decide", 0.125), ("first step", 0.375))
    found = waterfall.bars([KILLED, ROOT])
    assert found == [Bar("killed, rank 1, step 20", parts), Bar("root agent on h1, step 20 (interrupted)", parts)]
    assert found[0].seconds == KILLED["recovery_s"]


def test_a_bar_keeps_the_order_of_its_parts_beside_bars_with_others(tmp_path):
    bars = [Bar("a", (("detect", 1.0), ("restore", 2.0))), Bar("b", (("typed", 0.5), ("detect", 0.25)))]
    assert [bars[1].span("typed"), bars[1].span("detect")] == [(0.0, 0.5), (0.5, 0.25)]
    waterfall.draw_waterfall(bars, tmp_path / "a.png")
    picture = (imread(tmp_path / "a.png")[:, :, :3] * 255).round().astype(int)
    _, left = (picture == (31, 119, 180)).all(axis=2).nonzero()  # detect
    _, other = (picture == (44, 160, 44)).all(axis=2).nonzero()  # typed
    top, bottom = left[: len(left) // 2].min(), other.min()
    assert abs(top - bottom) <= 2  # both begin at 0: "typed" is first in its bar, though its colour is the third


def test_an_outage_begins_when_it_happened_not_when_it_was_decided_upon():
    assert waterfall.outages([KILLED]) == [(999.625, 1000.375)]


def test_steps_by_the_clock_leave_out_what_is_torn():
    lines = ['{"t": 5.0, "kind": "start"}', '{"t": 6.5, "kind": "step", "step": 1}', '{"t": 7.0, "kind": "st']
    assert waterfall.steps_by_clock(lines) == [(6.5, 1)]


def write(run_dir, failures, steps):
    (run_dir / "events").mkdir()
    (run_dir / "failures.jsonl").write_text("".join(json.dumps(one) + "\n" for one in failures))
    events = [{"t": 999.0 + step / 10, "kind": "step", "step": step} for step in range(1, steps + 1)]
    (run_dir / "events" / "rank-0.jsonl").write_text("".join(json.dumps(one) + "\n" for one in events))


@pytest.mark.parametrize(("failures", "steps"), [(1, 0), (3, 50), (200, 50)])
def test_the_picture_has_a_colour_for_each_part(tmp_path, failures, steps):
    write(tmp_path, [KILLED] * failures, steps)
    pixels = imread(waterfall.draw(tmp_path, tmp_path / "a.png"))[:, :, :3]
    seen = {tuple(one) for one in (pixels.reshape(-1, 3) * 255).round().astype(int).tolist()}
    assert {(31, 119, 180), (255, 127, 14), (44, 160, 44)} <= seen  # of detect, decide and first step
    assert pixels.shape[0] < 2700  # also of many failures


def test_nothing_to_draw_and_nowhere_to_write_are_errors(tmp_path):
    with pytest.raises(RunDirError, match="nothing to draw"):
        waterfall.draw(tmp_path, tmp_path / "a.png")
    write(tmp_path, [KILLED], 1)
    for path in (tmp_path / "no" / "a.png", tmp_path / "a.what"):
        with pytest.raises(RunDirError, match="cannot write .*; give another plot="):
            waterfall.draw(tmp_path, path)


def test_a_bar_longer_than_asked_for_is_cut_and_the_others_keep_their_room(tmp_path):
    pixels = {}
    for name, longest_s in (("cut", 1.0), ("whole", None)):
        bars = [Bar("short", (("detect", 1.0),)), Bar("long", (("restore", 20.0),))]
        waterfall.draw_waterfall(bars, tmp_path / f"{name}.png", longest_s=longest_s)
        picture = (imread(tmp_path / f"{name}.png")[:, :, :3] * 255).round().astype(int)
        pixels[name] = (picture == (31, 119, 180)).all(axis=2).sum()
    assert pixels["cut"] > 5 * pixels["whole"]
