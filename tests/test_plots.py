"""Plots: well-formed for whatever a log may hold, and true: marks lie where the numbers say."""

import math
import random
import re
from xml.etree import ElementTree as ET

import pytest

from llmtune import plots

NAMESPACE = "{http://www.w3.org/2000/svg}"


def parse(svg: str) -> ET.Element:
    """The tree of a plot, once every coordinate is a number inside the frame."""
    root = ET.fromstring(svg)
    width, height = (float(x) for x in root.attrib["viewBox"].split()[2:])
    for line in root.iter(f"{NAMESPACE}polyline"):
        for x, y in (point.split(",") for point in line.attrib["points"].split()):
            assert -0.1 <= float(x) <= width + 0.1
            assert -0.1 <= float(y) <= height + 0.1
    assert not re.search(r"\b(nan|inf)\b", " ".join(x.attrib.get("points", "") for x in root.iter()))
    return root


def words(root: ET.Element) -> list[str]:
    return [node.text or "" for node in root.iter(f"{NAMESPACE}text")]


def lines(root: ET.Element, colour: str) -> list[list[tuple[float, float]]]:
    found = [node for node in root.iter(f"{NAMESPACE}polyline") if node.attrib["class"] == f"s-{colour}"]
    return [[tuple(map(float, p.split(","))) for p in node.attrib["points"].split()] for node in found]


def log(losses: list[object], key: str = "loss") -> list[dict[str, object]]:
    return [{"step": step, key: loss} for step, loss in enumerate(losses, 1)]


@pytest.mark.parametrize("width", [340, 960])
@pytest.mark.parametrize(
    "metrics",
    [
        log([2.5]),
        log([2.5], "validation_loss"),
        log([2.0] * 40),
        log([0.0] * 3),
        log([math.nan, 2.0, None, math.inf, "2", True, 1.0]),
        log([1e-290, 1.0, 1e290]),
        log([-1e299, 1e299]),
        log([5e-324, 0.0]),
        log([1.0, 1.0 + 2e-16]),
        log([1e6, 2e6, 1e5]),
        [{"step": 0, "refusal_margin": 3.0}, *log([2.0, 1.0]), {"step": 2, "refusal_margin": -1.0}],
        [{"loss": 2.0}, {"step": None, "loss": 1.0}, {"step": 3, "loss": 1.0, "learning_rate": 0.0}],
        [{"step": 5, "loss": 1.0}, {"step": 5, "loss": 2.0}, {"step": 1, "loss": 3.0}],
        log([random.Random(0).gauss(2, 1) for _ in range(20_000)]) + log([2.0] * 200, "validation_loss"),
    ],
)
def test_curves_of_any_log_are_well_formed_and_stay_in_the_frame(metrics, width):
    svg = plots.curves_svg(metrics, width)
    parse(svg)
    assert len(svg) < 120_000


@pytest.mark.parametrize("metrics", [[], [{"step": 1}], log([math.nan]), [{"step": 1, "learning_rate": 1e-3}]])
def test_curves_without_a_loss_say_so(metrics):
    assert words(parse(plots.curves_svg(metrics))) == ["no loss was recorded"]


def test_curves_name_last_and_best_and_draw_best_lowest():
    metrics = log([4.0, 3.0, 2.5, 2.75]) + [
        {"step": s, "validation_loss": v} for s, v in ((2, 3.1), (3, 2.6), (4, 2.9))
    ]
    root = parse(plots.curves_svg(metrics))
    assert {"train loss, last 2.75", "validation loss, best 2.6 at step 3"} <= set(words(root))
    ring = lines(root, "paper")[-1][0]
    drawn = next(line for line in lines(root, "validation") if len(line) == 3)
    assert ring == drawn[1] == max(drawn, key=lambda point: point[1])  # pixels grow downwards


def test_a_spike_among_many_steps_is_drawn():
    calm = [2.0] * 50_000
    top = min(y for line in lines(parse(plots.curves_svg(log([*calm, 1.0]))), "train") for _, y in line)
    spiked = [*calm[:31_337], 9.0, *calm[31_337:]]
    root = parse(plots.curves_svg(log([*spiked, 1.0])))
    heights = [y for line in lines(root, "train") for _, y in line]
    assert min(heights) <= top + 1
    assert sorted(heights)[len(heights) // 2] > min(heights) + 100


def test_curves_stand_alone():
    svg = plots.curves_svg(log([3.0, 2.0]))
    assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert "prefers-color-scheme:dark" in svg
    root = ET.fromstring(svg)
    assert [child.tag.removeprefix(NAMESPACE) for child in root][:2] == ["title", "desc"]
    assert "train loss, last 2" in root[1].text


def test_ticks_are_round_ascending_and_inside():
    rng = random.Random(1)
    for _ in range(500):
        low = rng.uniform(-1, 1) * 10 ** rng.uniform(-6, 9)
        high = low + abs(low) * 10 ** rng.uniform(-5, 3)
        place, ticks = plots.scale([low, high], 0, 100)
        values = [value for value, _ in ticks]
        assert 1 <= len(ticks) <= 7
        assert values == sorted(values)
        assert len({label for _, label in ticks}) == len(ticks)
        assert [float(label) for _, label in ticks] == pytest.approx(values, rel=1e-9, abs=1e-12)
        assert all(-1e-6 <= place(value) <= 100 + 1e-6 for value in values)


ROW = {
    "group": "Task", "label": "docs: loss", "detail": "121 items", "figures": "−1 [−1.1, −0.9]", "verdict": "PASS",
    "higher_is_better": False, "delta": -1.0, "low": -1.1, "high": -0.9, "threshold": 0.1,
}  # fmt: skip


def spot(row: dict[str, object], colour: str) -> float:
    """Where a row's dot lies: -1 at the left end of its scale, 0 in the middle, 1 at the right end."""
    root = parse(plots.forest_svg([row]))
    left, right = (x for x, _ in lines(root, "line")[-1])
    dots = [line for line in lines(root, colour) if len(line) == 2 and line[0] == line[1]]
    return (2 * dots[0][0][0] - left - right) / (right - left)


def test_better_is_right_whatever_the_metric():
    assert spot(ROW, "pass") > 0.5
    assert spot(ROW | {"higher_is_better": True}, "pass") < -0.5
    assert spot(ROW | {"delta": 0.0, "verdict": "FAIL"}, "fail") == pytest.approx(0, abs=0.01)


def test_limit_lies_on_its_side_of_no_change():
    def side(**more: object) -> float:
        root = parse(plots.forest_svg([ROW | more]))
        return lines(root, "margin")[0][0][0] - lines(root, "muted")[0][0][0]

    assert side() < 0  # a loss may rise by 0.1: to the left
    assert side(threshold=-0.1) > 0  # a loss has to fall by 0.1: to the right
    assert side(higher_is_better=True, threshold=0.1) > 0
    assert not lines(parse(plots.forest_svg([ROW | {"threshold": None}])), "margin")


def test_interval_ends_are_drawn_where_they_are():
    root = parse(plots.forest_svg([ROW | {"delta": -0.5, "low": -1.0, "high": 0.25, "threshold": None}]))
    centre = lines(root, "muted")[0][0][0]
    bar = next(line for line in lines(root, "pass") if line[0][1] == line[1][1] and line[0][0] != line[1][0])
    assert (bar[1][0] - centre) / (bar[0][0] - centre) == pytest.approx(-0.25, abs=0.01)


@pytest.mark.parametrize("width", [340, 960])
@pytest.mark.parametrize(
    "more",
    [
        dict.fromkeys(("delta", "low", "high", "threshold")),
        {"low": None, "high": None},
        {"delta": 0, "low": 0, "high": 0, "threshold": 0},
        {"delta": 1e299, "low": -1e299, "high": 1e299},
        {"delta": 5e-324, "low": 0.0, "high": 5e-324, "threshold": None},
        {"delta": math.nan, "low": -math.inf, "high": math.inf},
        {"higher_is_better": None, "verdict": None},
    ],
)
def test_forest_of_any_row_is_well_formed(more, width):
    parse(plots.forest_svg([ROW, ROW | more, ROW | {"group": "Safety"}], width))


def test_forest_says_verdicts_in_words_and_escapes():
    rows = [ROW | {"verdict": verdict} for verdict in ("PASS", "FAIL", "INCONCLUSIVE", None)]
    said = words(parse(plots.forest_svg([*rows, ROW | {"label": "<script>&", "group": "A<b>"}])))
    assert {"✓ PASS", "✕ FAIL", "? INCONCLUSIVE", "reported", "<script>&", "A<b>"} <= set(said)
    assert words(parse(plots.forest_svg([]))) == ["← worse", "better →", "no change"]


def test_colours_can_be_read():
    """WCAG contrast of at least 4.5 for text, on light and on dark paper."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for name in plots.COLOURS.keys() - {"line", "paper"}:
        for i in (0, 1):
            one, other = sorted(luminance(plots.COLOURS[key][i]) for key in (name, "paper"))
            assert (other + 0.05) / (one + 0.05) >= 4.5, name


def test_own_limit_is_a_double_line_where_it_lies_and_is_not_drawn_far_away():
    def limit(**more: object) -> list[float]:
        root = parse(plots.forest_svg([ROW | {"own": "2 itself, at most 3"} | more]))
        assert "2 itself, at most 3" in words(root)
        centre = lines(root, "muted")[0][0][0]
        return [line[0][0] - centre for line in lines(root, "ink")]

    near = limit(floor_at=0.55)  # half of the longest mark, on the side of worse: a loss
    assert len(near) == 2
    width = 960 * (0.645 - 0.315) * 0.47
    assert sum(near) / 2 == pytest.approx(-width * 0.55 / 1.1, abs=0.1)
    assert limit(floor_at=-1.0)[0] > 0
    assert limit(floor_at=50.0) == limit(floor_at=None) == limit() == []


def test_noise_is_a_band_around_no_change():
    def band(noise: float | None) -> list[tuple[float, float]]:
        root = parse(plots.forest_svg([ROW | {"noise_at": noise}]))
        centre = lines(root, "muted")[0][0][0]
        rects = root.iter(f"{NAMESPACE}rect")
        return [
            (float(r.attrib["x"]) - centre, float(r.attrib["x"]) + float(r.attrib["width"]) - centre) for r in rects
        ]

    (left, right), reach = band(0.11)[0], 960 * (0.645 - 0.315) * 0.47
    assert (-left, right) == (pytest.approx(reach * 0.1, abs=0.2), pytest.approx(reach * 0.1, abs=0.2))
    assert band(None) == band(0.0) == band(math.nan) == []
    assert band(1e9)[0][1] <= reach * 1.06


def test_slices_of_a_metric_share_one_scale():
    def end(row: dict[str, object], most: float) -> float:
        root = parse(plots.interval_svg(row, most))
        return max(x for line in lines(root, "pass") for x, _ in line) - 110

    wide, narrow = ROW | {"delta": -1.0, "low": -2.0, "high": -0.5}, ROW | {"delta": -0.5, "low": -1.0, "high": -0.25}
    assert end(wide, 2.0) == pytest.approx(2 * end(narrow, 2.0), abs=0.2)
    svg = plots.interval_svg(ROW | {"verdict": "INSUFFICIENT", "low": None, "high": None}, 2.0)
    assert "<style>" not in svg  # the page has the colours once
    assert parse(svg)[1].text == "−1 [−1.1, −0.9], insufficient"


def test_reliability_shows_each_bin_where_it_is_and_says_it():
    bins = [{"confidence": 0.25, "accuracy": 0.5, "n": 10}, {"confidence": 0.75, "accuracy": 0.25, "n": 40}]
    svg = plots.reliability_svg(bins, "reliability of tuned")
    root = parse(svg)
    right = next(line for line in lines(root, "margin") if line[0] != line[1])  # from (0, 0) to (1, 1)
    (x0, y0), (x1, y1) = right
    dots = [line[0] for line in lines(root, "train") if line[0] == line[1]]
    assert [((x - x0) / (x1 - x0), (y - y0) / (y1 - y0)) for x, y in dots] == [
        (pytest.approx(0.25, abs=0.01), pytest.approx(0.5, abs=0.01)),
        (pytest.approx(0.75, abs=0.01), pytest.approx(0.25, abs=0.01)),
    ]
    sizes = [
        float(node.attrib["stroke-width"])
        for node in root.iter(f"{NAMESPACE}polyline")
        if node.attrib["class"] == "s-train"
    ]
    assert sizes[1] < sizes[3]
    assert root[1].text == "at 25% confidence 50% right of 10; at 75% confidence 25% right of 40"


@pytest.mark.parametrize(
    "bins", [[], [{"confidence": math.nan, "accuracy": 1.0, "n": 3}], [{"confidence": 1.0, "accuracy": 0.0, "n": 1}]]
)
def test_reliability_of_any_bins_is_well_formed(bins):
    parse(plots.reliability_svg(bins, "<none>"))
