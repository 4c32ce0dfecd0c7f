"""Which metrics exist, and what an expression of PromQL asks for: for the tests of the rules and of the dashboards."""

import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    path for name in ("contracts", "jobs", "drift", "monitoring") if (path := ROOT / f"docs/{name}.md").exists()
]
EXPORTERS = Path(__file__).with_name("exporter_metrics.txt")
EDGE_LOG = ROOT / "roles/edgelog/templates/edge.mtail.j2"
RULES = [
    *sorted((ROOT / "roles/prometheus/files/rules").glob("*.yml")),
    *sorted((ROOT / "roles/prometheus/templates").glob("*.yml.j2")),
]
# What the scrape adds, what every histogram has, and what an expression or a rule may make itself.
LABELS_OF_ALL = {"job", "instance", "colour", "probe", "le", "__name__", "group", "resource"}
OPERATORS = {"and", "or", "unless", "bool", "offset"}


def without_strings(expression):
    return re.sub(r'"(?:[^"\\]|\\.)*"', '""', expression)


def metrics(expression):
    """The names of the series that an expression asks for."""
    bare = re.sub(r"\[[^]]*\]|\{[^}]*\}|\boffset\s+\w+", "", without_strings(expression))
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", bare)
    return set(re.findall(r"\b[a-zA-Z_:][\w:]*\b(?!\s*\()", bare)) - OPERATORS


def matchers(expression):
    """The metrics that are asked for with matchers, each with the labels that those name."""
    found = re.findall(r"([a-zA-Z_:][\w:]*)\{([^}]*)\}", without_strings(expression))
    return [(name, set(re.findall(r"(\w+)\s*[=!]", inside))) for name, inside in found]


def grouped_labels(expression):
    lists = re.findall(
        r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)", without_strings(expression)
    )
    return {label.strip() for found in lists for label in found.split(",")} - {""}


def declared(text):
    """Metrics as they are written in documents, name{label,label}, each with its labels."""
    found = {}
    for name, labels in re.findall(r"(?<![\w/$.-])([a-z]\w*)(?:\{([\w,=\".| -]*)\})?", text):
        found.setdefault(name, set()).update(re.findall(r"[a-z_]+(?=[,=]|$)", labels.replace(" ", "")))
    return found


@functools.cache
def known():
    """Every metric that exists, with its labels; None where those aren't known."""
    found = declared("\n".join(line for line in EXPORTERS.read_text().splitlines() if not line.startswith("#")))
    found["ALERTS"] = {"alertname", "alertstate", "severity"}
    for document in DOCUMENTS:
        quoted = "\n".join(re.findall(r"`([^`\n]+)`", document.read_text(encoding="utf-8")))
        for name, labels in declared(quoted).items():
            # A text may mention a metric without its labels.
            found[name] = (found.get(name) or set()) | labels or None
    for name, labels in re.findall(
        r"^(?:counter|histogram) (\w+)(?: by ([a-z_, ]+?)(?: buckets|$))?", EDGE_LOG.read_text(), re.M
    ):
        found[name] = set(labels.replace(" ", "").split(",")) - {""}
    for name, labels in list(found.items()):
        if name.endswith("_seconds") or name in ("model_batch_rows", "model_prediction_confidence"):
            found.update({f"{name}_{part}": labels for part in ("bucket", "sum", "count")})
    found["appliance_shadow_distance_bucket"] = set()
    for path in RULES:
        recorded = re.findall(r"^\s*-?\s*record: *(\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        found.update(dict.fromkeys(recorded))
    return found


def unknown_labels(expression):
    """The labels that an expression names and that nothing it could mean them of has."""
    every = known()
    found = set()
    for name, labels in matchers(expression):
        if every.get(name) is not None:
            found |= labels - every[name] - LABELS_OF_ALL
    return found | grouped_labels(expression) - LABELS_OF_ALL.union(*(labels for labels in every.values() if labels))
