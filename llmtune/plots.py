"""Plots as plain SVG text, in light and dark, alone or inside a page: training curves, deltas, reliability of confidences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

Point = tuple[float, float]
Row = Mapping[str, Any]
Scale = tuple[Callable[[float], float], list[tuple[float, str]]]
COLOURS = {  # on light and on dark paper; at least 4.5:1 where it is text
    "ink": ("#1b1d21", "#e8e6e1"), "muted": ("#5b616c", "#a2a8b2"), "line": ("#dbdee3", "#383d45"),
    "train": ("#2d5fc4", "#8bb2ff"), "validation": ("#b4500b", "#f2a65e"), "paper": ("#ffffff", "#17191d"),
    "pass": ("#17733f", "#63d297"), "fail": ("#b9281f", "#ff8a80"), "inconclusive": ("#8a5a00", "#eab94d"),
    "margin": ("#b9281f", "#ff8a80"),
}  # fmt: skip
STYLE = """.plot polyline{fill:none;stroke-linejoin:round;stroke-linecap:round}.plot .s-margin{stroke-dasharray:3 4}
.plot text{font-family:system-ui,sans-serif;font-size:13px}.plot:root{color-scheme:light dark;background:Canvas}"""
WORDS = {"PASS": ("pass", "✓ PASS"), "FAIL": ("fail", "✕ FAIL"), "INCONCLUSIVE": ("inconclusive", "? INCONCLUSIVE")}


def curves_svg(metrics: Sequence[Row], width: int = 960) -> str:
    """Losses, the learning rate and a watched refusal margin from the lines of `metrics.jsonl`; non-finite ones are left out."""
    train, held_out, rate = (points(metrics, key) for key in ("loss", "validation_loss", "learning_rate"))
    margin = points(metrics, "refusal_margin")
    if not train and not held_out:
        return svg(width, 30, "Training curves", "Nothing to draw.", text(0, 20, "no loss was recorded", "muted"))
    best = min(held_out, key=lambda point: point[1], default=(0.0, 0.0))
    legend = [("train", f"train loss, last {train[-1][1]:.4g}")] if train else []
    legend += [("validation", f"validation loss, best {best[1]:.4g} at step {best[0]:.0f}")] if held_out else []
    left, right, top, bottom = 52, width - 14, 14 + 22 * len(legend), 240 + 22 * len(legend)
    foot = bottom + (70 if rate else 0) + (70 if margin else 0)
    steps, losses = zip(*train, *held_out, strict=True)
    (x, across), (y, up) = (
        scale([*steps, *(step for step, _ in margin)], left, right, most=8 if width > 600 else 4),
        scale(losses, bottom, top, 0.06),
    )
    parts = [text((left + right) / 2, foot + 40, "step", "muted", "middle")]
    parts += [text(x(value), foot + 20, label, "muted", "middle") for value, label in across]
    for value, label in up:
        parts += [line([(left, y(value)), (right, y(value))]), text(left - 8, y(value) + 4, label, "muted", "end")]
    for i, (colour, label) in enumerate(legend):
        parts += [line([(left, 10 + 22 * i), (left + 20, 10 + 22 * i)], colour, 3), text(left + 30, 15 + 22 * i, label)]
    reach = min(len(train) // 30, 50)  # from 30 steps on, a strong running mean over a faint line of every step
    near = [(step, [loss for _, loss in train[max(0, i - reach) : i + reach + 1]]) for i, (step, _) in enumerate(train)]
    mean = [(x(step), y(sum(losses) / len(losses))) for step, losses in near]
    seen = [(x(step), y(loss)) for step, loss in held_out]
    ring = [(x(best[0]), y(best[1]))] * 2 if held_out else []
    each = [(x(step), y(loss)) for step, loss in train]
    parts += [line(each, "train", 1, 0.4), line(mean, "train", 2.2), line(each[-1:] * 2, "train", 7)]
    parts += [line(seen, "validation", 2.2), *(line([p, p], "validation", 6) for p in seen if len(seen) <= 60)]
    parts += [line(ring, "validation", 13), line(ring, "paper", 8)]
    for number in sorted({row["phase"] for row in metrics if row.get("phase", 1) > 1}):
        at = x(min(row["step"] for row in metrics if row.get("phase") == number))
        parts += [line([(at, top), (at, foot)], "muted"), text(at + 6, top + 12, f"phase {number}", "muted")]
    if margin:
        under = bottom + 70
        small, _ = scale([value for _, value in margin], under, under - 30)
        parts += [line([(left, under), (right, under)]), line([(x(s), small(v)) for s, v in margin], "muted", 1.4)]
        figures = f"refusal margin, {margin[0][1]:.3g} to {margin[-1][1]:.3g} nats"
        parts.append(text(right, under - 38, figures, "muted", "end"))
    if rate:
        small, _ = scale([0.0, peak := max(value for _, value in rate)], foot, foot - 30)
        parts += [line([(left, foot), (right, foot)]), line([(x(s), small(v)) for s, v in rate], "muted", 1.4)]
        parts.append(text(right, foot - 38, f"learning rate, peak {peak:.2g}", "muted", "end"))
    return svg(width, foot + 48, "Training curves", "; ".join(label for _, label in legend), *parts)


def forest_svg(rows: Sequence[Row], width: int = 960) -> str:
    """A line a row: the delta with its interval against no change and the margin. Right is better, whatever the metric.

    A row has group, label, detail, figures, own (texts; own: of the model's own limit, or None), verdict, higher_is_better,
    and delta, low, high, threshold (where the margin lies), floor_at (where the own limit lies), noise_at (how far the base is
    from itself) as numbers in the metric's unit or None. Units differ, so each row has its own scale; an own limit far beyond it is said and not drawn.
    """
    wide, group, y = width > 600, None, 22.0
    start, end = (width * 0.315, width * 0.645) if wide else (8, width - 8)
    parts = [text(start, 14, "← worse", "muted"), text(end, 14, "better →", "muted", "end")]
    parts.append(text((start + end) / 2, 14, "no change", "muted", "middle"))
    for row in rows:
        if row["group"] != group:
            group, y = row["group"], y + 36
            parts += [text(0, y - 9, group, bold=True), line([(0, y), (width, y)])]
        (colour, word), own = WORDS.get(row["verdict"], ("muted", "reported")), row.get("own")
        parts += [text(0, y + 22, row["label"]), text(0, y + 40, row["detail"], "muted")]
        parts.append(text(width * 0.67 if wide else 0, y + ((22 if own else 31) if wide else 60), row["figures"]))
        parts.append(text(width, y + (31 if wide else 60), word, colour, "end", bold=colour != "muted"))
        parts += [text(width * 0.67 if wide else 0, y + (40 if wide else 78), own, "muted")] if own else []
        parts += _interval(row, start, end, y + (26 if wide else 102 if own else 84), colour)
        y += 50 if wide else 124 if own else 106
    return svg(width, y + 6, "Change per metric", f"{len(rows)} rows; the table has the same figures.", *parts)


def interval_svg(row: Row, most: float, width: int = 220) -> str:
    """One row of a forest without words, for a cell of a table: its delta, interval and margin on a scale of -most to most."""
    colour, word = WORDS.get(row["verdict"], ("muted", str(row["verdict"]).lower()))
    return svg(
        width, 28, "Change", f"{row['figures']}, {word}", *_interval(row, 2, width - 2, 14, colour, most), alone=False
    )


def _interval(row: Row, start: float, end: float, mid: float, colour: str, most: float = 0) -> list[str]:
    sign, centre = -1 if row["higher_is_better"] is False else 1, (start + end) / 2
    marks = {key: sign * row[key] for key in ("delta", "low", "high", "threshold") if finite(row.get(key))}
    most = most or max(map(abs, marks.values()), default=0) or 1
    if finite(row.get("floor_at")) and abs(row["floor_at"]) <= 3 * most:
        marks["floor_at"] = sign * row["floor_at"]
        most = max(most, abs(row["floor_at"]))
    at = {key: centre + value / most * (end - start) * 0.47 for key, value in marks.items()} | {"zero": centre}
    strokes = [
        ("zero", 14, "muted", 1),
        ("threshold", 14, "margin", 1.6),
        ("low", 5, colour, 2),
        ("high", 5, colour, 2),
    ]
    parts = [line([(start, mid), (end, mid)])]
    if finite(row.get("noise_at")) and row["noise_at"] > 0:
        reach = min(1.05, row["noise_at"] / most) * (end - start) * 0.47
        box = f'x="{centre - reach:.1f}" y="{mid - 10:.1f}" width="{2 * reach:.1f}" height="20"'
        parts.append(f'<rect class="f-line" {box}/>')
    parts += [line([(at[key], mid - up), (at[key], mid + up)], c, w) for key, up, c, w in strokes if key in at]
    own = [at["floor_at"] + side for side in (-2.5, 2.5)] if "floor_at" in at else []
    parts += [line([(x, mid - 14), (x, mid + 14)], "ink", 1.4) for x in own]
    parts.append(line([(at[key], mid) for key in ("low", "high") if key in at], colour, 3.5))
    spot = [(at["delta"], mid)] * 2 if "delta" in at else []
    return [*parts, line(spot, colour, 12), line(spot, colour if colour in ("pass", "fail") else "paper", 7)]


def reliability_svg(bins: Sequence[Row], title: str, size: int = 300) -> str:
    """Accuracy over confidence, a dot a bin whose area is its number of items; on the dashed line confidence is right.

    bins: {"confidence", "accuracy", "n"} each. Above the line the model knows more than it says, below it less.
    """
    left, top, side = 44, 12, size - 56
    (x, _), (y, _) = scale([0.0, 1.0], left, left + side), scale([0.0, 1.0], top + side, top)
    parts = [line([(x(0), y(0)), (x(1), y(1))], "margin", 1.6)]
    for value in (0, 0.25, 0.5, 0.75, 1):
        parts += [
            line([(x(0), y(value)), (x(1), y(value))]),
            text(left - 8, y(value) + 4, f"{value * 100:g}", "muted", "end"),
        ]
        parts.append(text(x(value), y(0) + 18, f"{value * 100:g}", "muted", "middle"))
    kept = [one for one in bins if finite(one["confidence"]) and finite(one["accuracy"]) and one["n"] > 0]
    total = sum(one["n"] for one in kept)
    for one in kept:
        across, up, right = x(one["confidence"]), y(one["accuracy"]), y(one["confidence"])
        parts.append(line([(across, right), (across, up)], "train", 2))
        parts.append(line([(across, up)] * 2, "train", 5 + 22 * math.sqrt(one["n"] / total)))
    parts.append(text(x(0.5), size - 2, "confidence, % (up: right, %)", "muted", "middle"))
    said = "; ".join(
        f"at {one['confidence']:.0%} confidence {one['accuracy']:.0%} right of {one['n']:g}" for one in kept
    )
    return svg(size, size + 4, title, said or "no items", *parts, alone=False)


def scale(values: Sequence[float], start: float, end: float, pad: float = 0, most: int = 5) -> Scale:
    """A linear map from the range of `values` (widened where they are constant) to pixels, and some `most` ticks."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
        low, high = low - (abs(low) * 0.05 or 0.5), high + (abs(high) * 0.05 or 0.5)
    low, high = low - pad * (high - low), high + pad * (high - low)
    rough, top = (high - low) / most, max(abs(low), abs(high))
    step = next(size for i in (1, 2, 5, 10) if (size := i * 10.0 ** math.floor(math.log10(rough))) >= rough * 0.999)
    digits = -math.floor(math.log10(step * 1.001))
    spec = f".{max(0, digits)}f" if digits < 5 and top < 1e5 else f".{math.floor(math.log10(top)) + digits + 1}g"
    ticks = [(i * step, f"{i * step:{spec}}") for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return lambda value: start + (value - low) / (high - low) * (end - start), ticks


def points(metrics: Sequence[Row], key: str) -> list[Point]:
    return sorted((row["step"], row[key]) for row in metrics if finite(row.get("step")) and finite(row.get(key)))


def finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def text(x: float, y: float, words: object, colour: str = "ink", anchor: str = "start", bold: bool = False) -> str:
    style = f'class="f-{colour}" text-anchor="{anchor}" font-weight="{600 if bold else 400}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(str(words))}</text>'


def line(at: Sequence[Point], colour: str = "line", width: float = 1, opacity: float = 1) -> str:
    size = len(at) // 600 + 1  # a long line keeps the lowest and the highest point of each bucket: no spike is lost
    buckets = [sorted(at[i : i + size], key=lambda point: point[1]) for i in range(0, len(at), size)]
    kept = " ".join(f"{x:.1f},{y:.1f}" for bucket in buckets for x, y in sorted({bucket[0], bucket[-1]}))
    return f'<polyline class="s-{colour}" stroke-width="{width}" opacity="{opacity}" points="{kept}"/>' if at else ""


def svg(width: float, height: float, title: str, description: str, *parts: str, alone: bool = True) -> str:
    """alone: it brings the colours along; else the page around it has them, from `rules`."""
    frame = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    style = f"<style>{rules()}</style>" if alone else ""
    head = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{style}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" role="img" {frame}>{head}{"".join(parts)}</svg>\n'


def rules() -> str:
    """The colours of all plots, on light and on dark paper."""
    light, dark = (
        "".join(f".plot .f-{c}{{fill:{p[i]}}}.plot .s-{c}{{stroke:{p[i]}}}" for c, p in COLOURS.items()) for i in (0, 1)
    )
    return f"{STYLE}{light}@media screen and (prefers-color-scheme:dark){{{dark}}}"
