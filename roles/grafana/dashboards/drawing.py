"""SVG of the panels that the dashboards use, roughly as Grafana draws them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

COLUMN, ROW, GAP = 64, 34, 4
HEADER = 56
BACKGROUND, PANEL, LINES, TEXT, FAINT = "#111217", "#181b1f", "#2c3235", "#d8d9da", "#8e9297"
NAMED = {
    "green": "#73bf69",
    "red": "#f2495c",
    "orange": "#ff9830",
    "blue": "#5794f2",
    "purple": "#b877d9",
    "text": TEXT,
    "transparent": "none",
}
PALETTE = ("#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#5794f2", "#b877d9", "#fade2a", "#c0d8ff", "#ffa6b0")
SHADES = {"blue": ("#5794f2", "#1f60c4", "#8ab8ff", "#c0d8ff"), "green": ("#73bf69", "#37872d", "#96d98d", "#c8f2c2")}
SUFFIXES = {"reqps": " req/s", "rowsps": " rows/s", "cps": " c/s", "pps": " p/s", "Bps": "B/s", "bytes": "B"}
# About what a character of the font takes.
CHARACTER = 0.56


@dataclass(frozen=True)
class Series:
    """Points (seconds since the epoch, value) with the name that a legend shows."""

    name: str
    labels: dict[str, str]
    points: Sequence[tuple[float, float]]

    @property
    def last(self) -> float:
        return self.points[-1][1]


@dataclass(frozen=True)
class Box:
    x: float
    y: float
    width: float
    height: float


class Canvas:
    """One dashboard. `period` is start, end and step in seconds; `marks` are moments with their colours."""

    def __init__(
        self, dashboard: dict[str, Any], period: tuple[int, int, int], marks: Sequence[tuple[float, str]]
    ) -> None:
        self.start, self.end, self.step = period
        self.marks = marks
        self.width = 24 * COLUMN + 2 * GAP
        self.height = HEADER + ROW * max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
        self.parts: list[str] = []
        self.rectangle(Box(0, 0, self.width, self.height), BACKGROUND)
        self.text(14, 26, dashboard["title"], 20)
        until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(self.end))
        self.text(
            14, 45, f"{dashboard['description']}  {(self.end - self.start) // 60} minutes until {until}.", 12, FAINT
        )

    def document(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" font-family="Inter, Helvetica, Arial, sans-serif">'
        )
        return "\n".join([head, *self.parts, "</svg>\n"])

    def panel(self, panel: dict[str, Any], found: Sequence[Sequence[Series]]) -> None:
        """Draw a panel with the series of each of its targets."""
        place = panel["gridPos"]
        box = Box(GAP + place["x"] * COLUMN, HEADER + place["y"] * ROW, place["w"] * COLUMN, place["h"] * ROW)
        if panel["type"] == "row":
            self.text(box.x + 10, box.y + 22, panel["title"], 15)
            return
        self.rectangle(Box(box.x + 2, box.y + 2, box.width - GAP, box.height - GAP), PANEL, LINES)
        self.text(box.x + 10, box.y + 19, panel["title"], 12, width=box.width - 20)
        inner = Box(box.x + 10, box.y + 28, box.width - 20, box.height - 38)
        series = [one for target in found for one in target]
        draw = {
            "stat": self._stat,
            "timeseries": self._timeseries,
            "bargauge": self._bars,
            "heatmap": self._heatmap,
            "state-timeline": self._timeline,
        }.get(panel["type"])
        if not series:
            self.text(inner.x + inner.width / 2, inner.y + inner.height / 2, "No data", 13, FAINT, anchor="middle")
        elif draw is None:
            self._table(panel, inner, found)
        else:
            draw(panel, inner, series)

    def rectangle(self, box: Box, fill: str, stroke: str = "none", opacity: float = 1, title: str = "") -> None:
        if box.width <= 0 or box.height <= 0:
            return
        tip = f"<title>{escape(title)}</title>" if title else ""
        self.parts.append(
            f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" rx="1" '
            f'fill="{fill}" stroke="{stroke}" fill-opacity="{opacity:.2f}">{tip}</rect>'
        )

    def text(
        self, x: float, y: float, text: str, size: float, fill: str = TEXT, anchor: str = "start", width: float = 0
    ) -> None:
        most = int(width / (size * CHARACTER)) if width else len(text)
        shown = text if len(text) <= most else text[: max(most - 1, 1)] + "…"
        place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" text-anchor="{anchor}"'
        self.parts.append(f'<text {place} fill="{fill}">{escape(shown)}</text>')

    def line(self, x1: float, y1: float, x2: float, y2: float, stroke: str, dashes: str = "") -> None:
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}"{dashed}/>')

    def _stat(self, panel: dict[str, Any], box: Box, series: Sequence[Series]) -> None:
        defaults = panel["fieldConfig"]["defaults"]
        only_name = panel["options"]["textMode"] == "name"
        wide = box.width / len(series)
        for index, one in enumerate(series):
            value = one.name if only_name else word(one.last, defaults) or quantity(one.last, defaults)
            size = max(11.0, min(box.height * 0.5, 30.0, wide * 0.92 / (max(len(value), 1) * CHARACTER)))
            middle = box.x + wide * (index + 0.5)
            fill = TEXT if only_name else colour_of(one.last, defaults)
            self.text(middle, box.y + box.height * 0.55, value, size, fill, "middle", wide)
            if len(series) > 1 and not only_name:
                self.text(middle, box.y + box.height - 8, one.name, 12, FAINT, "middle", wide - 6)

    def _timeseries(self, panel: dict[str, Any], box: Box, series: Sequence[Series]) -> None:
        defaults = panel["fieldConfig"]["defaults"]
        stacked = defaults["custom"]["stacking"]["mode"] == "normal"
        colours = line_colours(panel, series)
        plot = self._plot(box, self._legend(box, series, colours))
        lines = stack(series) if stacked else [one.points for one in series]
        values = [value for points in lines for _, value in points if math.isfinite(value)]
        low, high = scale(values, defaults)
        self._time_axis(plot)
        for tick in ticks(low, high):
            y = plot.y + plot.height * (1 - (tick - low) / (high - low))
            self.line(plot.x, y, plot.x + plot.width, y, LINES)
            self.text(plot.x - 5, y + 4, quantity(tick, defaults), 10, FAINT, "end")
        # The first of a stack lies lowest, so it is drawn last.
        for points, colour in reversed(list(zip(lines, colours, strict=True))):
            self._curve(plot, points, low, high, colour, 0.35 if stacked else 0)
        for step in defaults.get("thresholds", {}).get("steps", []):
            if step["value"] is not None and low <= step["value"] <= high:
                y = plot.y + plot.height * (1 - (step["value"] - low) / (high - low))
                self.line(plot.x, y, plot.x + plot.width, y, NAMED.get(step["color"], FAINT), "6 4")
        for moment, colour in self.marks:
            self.line(self._x(plot, moment), plot.y, self._x(plot, moment), plot.y + plot.height, NAMED[colour], "3 3")

    def _plot(self, box: Box, below: float) -> Box:
        return Box(box.x + 52, box.y + 4, box.width - 60, box.height - 20 - below)

    def _x(self, plot: Box, moment: float) -> float:
        return plot.x + plot.width * (moment - self.start) / (self.end - self.start)

    def _time_axis(self, plot: Box) -> None:
        pieces = max(2, int(plot.width / 110))
        for index in range(pieces + 1):
            moment = self.start + (self.end - self.start) * index / pieces
            label = time.strftime("%H:%M", time.gmtime(moment))
            self.text(self._x(plot, moment), plot.y + plot.height + 14, label, 10, FAINT, "middle")

    def _curve(
        self, plot: Box, points: Iterable[tuple[float, float]], low: float, high: float, colour: str, fill: float
    ) -> None:
        """A line that breaks where points are missing, and where asked for the area below it."""
        pieces: list[list[str]] = []
        before = -math.inf
        for moment, value in points:
            if not math.isfinite(value):
                continue
            if moment - before > 1.5 * self.step:
                pieces.append([])
            y = plot.y + plot.height * (1 - (min(max(value, low), high) - low) / (high - low))
            pieces[-1].append(f"{self._x(plot, moment):.1f},{y:.1f}")
            before = moment
        bottom = plot.y + plot.height
        for piece in pieces:
            if fill:
                first, last = piece[0].split(",")[0], piece[-1].split(",")[0]
                area = " ".join([f"{first},{bottom:.1f}", *piece, f"{last},{bottom:.1f}"])
                self.parts.append(f'<polygon points="{area}" fill="{colour}" fill-opacity="{fill}"/>')
            if len(piece) == 1:
                x, y = piece[0].split(",")
                self.parts.append(f'<circle cx="{x}" cy="{y}" r="1.5" fill="{colour}"/>')
            self.parts.append(
                f'<polyline points="{" ".join(piece)}" fill="none" stroke="{colour}" stroke-width="1.4"/>'
            )

    def _legend(self, box: Box, series: Sequence[Series], colours: Sequence[str]) -> float:
        """Names below a plot, in at most two lines; returns their height."""
        places: list[tuple[float, int, int]] = []
        x, row = 0.0, 0
        for index, one in enumerate(series):
            wide = 24 + len(one.name) * 11 * CHARACTER
            if x and x + wide > box.width:
                x, row = 0.0, row + 1
            if row > 1:
                break
            places.append((x, row, index))
            x += wide
        height = 16 * (1 + max(row for _, row, _ in places))
        for x, row, index in places:
            y = box.y + box.height - height + 16 * row + 12
            self.rectangle(Box(box.x + x, y - 5, 10, 3), colours[index])
            self.text(box.x + x + 14, y, series[index].name, 11, FAINT, width=box.width - 14)
        return height

    def _bars(self, panel: dict[str, Any], box: Box, series: Sequence[Series]) -> None:
        defaults = panel["fieldConfig"]["defaults"]
        most = defaults.get("max") or max((one.last for one in series), default=1) or 1
        tall = min(26.0, box.height / len(series))
        names = min(box.width * 0.4, 12 + 11 * CHARACTER * max(len(one.name) for one in series))
        for index, one in enumerate(series):
            y = box.y + index * tall
            full = Box(box.x + names, y + 2, box.width - names - 60, tall - 4)
            self.text(box.x, y + tall / 2 + 4, one.name, min(11, tall), width=names)
            self.rectangle(full, LINES)
            part = max(0.0, min(one.last / most, 1.0))
            self.rectangle(Box(full.x, full.y, full.width * part, full.height), colour_of(one.last, defaults))
            self.text(box.x + box.width, y + tall / 2 + 4, quantity(one.last, defaults), min(11, tall), anchor="end")

    def _heatmap(self, panel: dict[str, Any], box: Box, series: Sequence[Series]) -> None:
        """Cells of a cumulative histogram: each bucket less the one below it."""
        buckets = sorted(series, key=lambda one: float(one.labels["le"]))
        plot = self._plot(box, 0)
        below: dict[float, float] = {}
        cells: list[tuple[int, float, float]] = []
        for index, bucket in enumerate(buckets):
            cells += [(index, at, max(0.0, value - below.get(at, 0.0))) for at, value in bucket.points]
            below = dict(bucket.points)
        most = max((value for _, _, value in cells if math.isfinite(value)), default=0) or 1
        tall, wide = plot.height / len(buckets), plot.width * self.step / (self.end - self.start)
        self._time_axis(plot)
        for index, bucket in enumerate(buckets):
            y = plot.y + plot.height - index * tall
            name = "more" if bucket.labels["le"] == "+Inf" else quantity(float(bucket.labels["le"]), {"unit": "s"})
            self.text(plot.x - 5, y - tall / 2 + 4, name, 9, FAINT, "end")
        for index, at, value in cells:
            if value > 1e-9 and math.isfinite(value):
                y = plot.y + plot.height - (index + 1) * tall
                strength = 0.15 + 0.85 * math.sqrt(value / most)
                self.rectangle(
                    Box(self._x(plot, at) - wide, y + 0.5, wide, tall - 1), NAMED["orange"], opacity=strength
                )

    def _timeline(self, panel: dict[str, Any], box: Box, series: Sequence[Series]) -> None:
        defaults = panel["fieldConfig"]["defaults"]
        tall = min(26.0, (box.height - 18) / len(series))
        names = min(box.width * 0.3, 12 + 11 * CHARACTER * max(len(one.name) for one in series))
        plot = Box(box.x + names, box.y, box.width - names - 16, tall * len(series))
        self._time_axis(plot)
        for index, one in enumerate(series):
            self.text(box.x, box.y + (index + 0.5) * tall + 4, one.name, min(11, tall), width=names)
            for start, end, value in runs(one.points, self.step):
                left = max(plot.x, self._x(plot, start - self.step))
                area = Box(left, box.y + index * tall + 1, self._x(plot, end) - left, tall - 2)
                self.rectangle(area, mapped_colour(value, defaults), opacity=0.7, title=word(value, defaults))

    def _table(self, panel: dict[str, Any], box: Box, found: Sequence[Sequence[Series]]) -> None:
        organised = next(step["options"] for step in panel["transformations"] if step["id"] == "organize")
        names, titles = list(organised["indexByName"]), organised["renameByName"]
        labels = [name for name in names if name not in titles]
        fields = {entry["matcher"]["options"]: entry["properties"] for entry in panel["fieldConfig"]["overrides"]}
        rows: dict[tuple[str, ...], dict[int, float]] = {}
        for column, series in enumerate(found):
            for one in series:
                key = tuple(one.labels.get(label, "") for label in labels)
                rows.setdefault(key, {})[column] = one.last
        cells = [[(label, TEXT) for label in key] for key in sorted(rows)]
        for line, key in zip(cells, sorted(rows), strict=True):
            for column, title in enumerate(titles.values()):
                defaults = {entry["id"]: entry["value"] for entry in fields[title]}
                value = rows[key].get(column)
                line.append(("", TEXT) if value is None else (quantity(value, defaults), colour_of(value, defaults)))
        heads = [*labels, *titles.values()]
        widths = [
            1 + max(len(text) for text in [head, *(line[index][0] for line in cells)])
            for index, head in enumerate(heads)
        ]
        unit = box.width / sum(widths)
        fits = int(box.height / 20) - 1
        for number, line in enumerate([[(head, FAINT) for head in heads], *cells[:fits]]):
            y = box.y + 14 + 20 * number
            self.line(box.x, y + 5, box.x + box.width, y + 5, LINES)
            for index, (text, fill) in enumerate(line):
                self.text(box.x + unit * sum(widths[:index]), y, text, 12, fill, width=unit * widths[index])


def line_colours(panel: dict[str, Any], series: Sequence[Series]) -> list[str]:
    """Shades of blue and green for series that begin with a colour's name, where the panel says so; else a palette."""
    shaded = bool(panel["fieldConfig"]["overrides"])
    used = {name: 0 for name in SHADES}
    found = []
    for index, one in enumerate(series):
        name = one.name.split(" ")[0]
        if shaded and name in SHADES:
            found.append(SHADES[name][used[name] % len(SHADES[name])])
            used[name] += 1
        else:
            found.append(PALETTE[index % len(PALETTE)])
    return found


def stack(series: Sequence[Series]) -> list[list[tuple[float, float]]]:
    """Each series' points on top of all before it."""
    sums: dict[float, float] = {}
    stacked = []
    for one in series:
        for at, value in one.points:
            sums[at] = sums.get(at, 0.0) + (value if math.isfinite(value) else 0.0)
        stacked.append([(at, sums[at]) for at, _ in one.points])
    return stacked


def runs(points: Iterable[tuple[float, float]], step: float) -> list[tuple[float, float, float]]:
    """Stretches of the same value: first moment, last moment, value."""
    found: list[tuple[float, float, float]] = []
    for at, value in points:
        if found and found[-1][2] == value and at - found[-1][1] <= 1.5 * step:
            found[-1] = (found[-1][0], at, value)
        else:
            found.append((at, at, value))
    return found


def scale(values: Sequence[float], defaults: dict[str, Any]) -> tuple[float, float]:
    """From where to where an axis goes: what the panel says, else what its values need."""
    low = defaults.get("min", min(values, default=0.0))
    high = defaults.get("max", max(values, default=1.0) * (1.05 if "min" in defaults else 1.0))
    if high <= low:
        high = low + (abs(low) * 0.1 or 1.0)
    return low, high


def ticks(low: float, high: float) -> list[float]:
    """About four round numbers between two others."""
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def quantity(value: float, defaults: dict[str, Any]) -> str:
    """A value with its unit."""
    unit, decimals = defaults.get("unit", "short"), defaults.get("decimals")
    if not math.isfinite(value):
        return str(value)
    if unit == "bool_yes_no":
        return "Yes" if value else "No"
    if unit == "dateTimeFromNow":
        return ago(time.time() - value / 1000)
    if unit == "percentunit":
        return f"{value * 100:.{decimals}f}%" if decimals is not None else f"{significant(value * 100)}%"
    if unit == "percent":
        return f"{significant(value)}%"
    if unit == "s":
        return duration(value)
    if unit in ("bytes", "Bps"):
        return prefixed(value, 1024, ("", "Ki", "Mi", "Gi", "Ti")) + SUFFIXES[unit]
    if decimals is not None and abs(value) < 1000:
        return f"{value:.{decimals}f}"
    return prefixed(value, 1000, ("", "K", "M", "G", "T")).replace(" ", "") + SUFFIXES.get(unit, "")


def significant(value: float) -> str:
    """Three digits, without zeros at the end."""
    return f"{float(f'{value:.3g}'):.9f}".rstrip("0").rstrip(".") if value else "0"


def prefixed(value: float, base: int, prefixes: Sequence[str]) -> str:
    power = min(len(prefixes) - 1, int(math.log(abs(value), base))) if abs(value) >= base else 0
    return f"{significant(value / base**power)} {prefixes[power]}"


def duration(value: float) -> str:
    for limit, unit in ((1e-3, "µs"), (1.0, "ms")):
        if 0 < abs(value) < limit:
            return f"{significant(value / limit * 1000)} {unit}"
    return f"{significant(value)} s" if abs(value) < 120 else span(value)


def span(value: float) -> str:
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    size, unit = next((size, unit) for size, unit in units if abs(value) >= size or size == 1)
    return f"{significant(round(value / size, 1))} {unit}"


def ago(value: float) -> str:
    return f"{span(value)} ago" if value >= 0 else f"in {span(-value)}"


def colour_of(value: float, defaults: dict[str, Any]) -> str:
    """The colour that a value's thresholds give it."""
    chosen = "text"
    for step in defaults.get("thresholds", {}).get("steps", []):
        if step["value"] is None or value >= step["value"]:
            chosen = step["color"]
    return NAMED.get(chosen, TEXT)


def mapping(value: float, defaults: dict[str, Any]) -> dict[str, Any]:
    options = (entry["options"] for entry in defaults.get("mappings", []))
    return next((found[f"{value:g}"] for found in options if f"{value:g}" in found), {})


def word(value: float, defaults: dict[str, Any]) -> str:
    return mapping(value, defaults).get("text", "")


def mapped_colour(value: float, defaults: dict[str, Any]) -> str:
    return NAMED.get(mapping(value, defaults).get("color", "text"), TEXT)
