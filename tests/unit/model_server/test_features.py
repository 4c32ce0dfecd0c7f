"""The training rows' reference, and what live rows are counted as beside it."""

import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import pytest
import torch
from bundle_making import ROOT, SHIPPED, write_sums
from model_server import bundle_tool, features, reference
from model_server.bundle import BundleError, read
from model_server.metrics import Metrics
from service_process import running

ONE = {
    "name": "x",
    "center": 10.0,
    "scale": 2.0,
    "mean": 10.0,
    "std": 2.0,
    "edges": [8.0, 10.0],
    "ratios": [0.2, 0.3, 0.5],
    "minimum": 4.0,
    "maximum": 16.0,
}
CONSTANT = ONE | {"name": "c", "scale": 1.0, "std": 0.0, "edges": [], "ratios": [], "minimum": 10.0, "maximum": 10.0}


def document(*listed: dict, **top: object) -> bytes:
    return json.dumps({"count": 1000, "features": list(listed)} | top).encode()


# --- reference.json


def test_a_reference_describes_the_training_values():
    chance = random.Random(1)
    values = [chance.gauss(5, 2) for _ in range(1000)]
    text = reference.to_text(reference.measure({"a": values, "b": [float(value > 6) for value in values]}))
    a, b = reference.parse(text.encode()).features
    assert (a.mean, a.std) == (pytest.approx(statistics.fmean(values)), pytest.approx(statistics.stdev(values)))
    assert (a.center, a.scale, a.minimum, a.maximum) == (a.mean, a.std, min(values), max(values))
    assert a.ratios == (0.1,) * 10
    assert [sum(value < edge for value in values) for edge in a.edges] == list(range(100, 1000, 100))
    # Two values make two bins, and no rounding moves a value over the edge.
    assert b.edges == (0.5,) and b.ratios == (1 - b.mean, b.mean)


def test_missing_values_are_left_out_and_constants_have_no_bins():
    one, two = reference.measure({"one": [3.0, math.nan, 5.0], "two": [7.0, 7.0, 7.0]})["features"]
    assert (one["mean"], one["std"], one["edges"]) == (4.0, pytest.approx(math.sqrt(2)), (4.0,))
    assert (two["center"], two["scale"], two["std"], two["edges"], two["ratios"]) == (7.0, 1.0, 0.0, (), ())


@pytest.mark.parametrize("values", [[1.0, math.inf], [math.nan, math.nan], [1e308, -1e308]])
def test_values_that_have_no_statistics_are_refused(values):
    with pytest.raises(ValueError, match="^age "):
        reference.measure({"age": values})


@pytest.mark.parametrize("seed", range(20))
def test_any_training_values_make_a_reference_that_is_accepted(seed):
    chance = random.Random(seed)
    few = chance.choice((1, 2, 5, 2000))
    values = [chance.choice((1, 1e-300, 1e140)) * chance.randrange(few) for _ in range(chance.randrange(1, 3000))]
    [found] = reference.parse(reference.to_text(reference.measure({"x": values})).encode()).features
    assert [sum(value >= edge for value in values) for edge in found.edges] == [
        round(sum(found.ratios[index:]) * len(values)) for index in range(1, len(found.ratios))
    ]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"{", "is not JSON"),
        (b"[]", "the document must be an object"),
        (b'{"count": 5}', "features is missing"),
        (document(ONE, count=0), "count is 0; it must be a whole number from 1"),
        (document(ONE, extra=1), "extra is not a known field"),
        (document(), "features is []; it must be a list of 1 to 100 features"),
        (document(ONE, ONE), "features: the name 'x' is there twice"),
        (document(ONE | {"name": ""}), "features[0].name is ''; it must be text of 1 to 100 characters"),
        (document(ONE | {"scale": 0}), "features[0].scale is 0; it must be a finite number above 0"),
        (document(ONE | {"std": -1}), "features[0].std is -1; it must be a finite number from 0"),
        (document(ONE | {"mean": math.nan}), "features[0].mean is nan; it must be a finite number"),
        (document(ONE | {"edges": [1, 1]}), "features[0].edges is [1.0, 1.0]; it must be a list of rising numbers"),
        (document(ONE | {"edges": []}), "features[0].edges is []; it must be empty where std is 0, and else not"),
        (document(ONE | {"ratios": [1]}), "features[0].ratios is [1.0]; it must be a list of 3 shares"),
        (document(ONE | {"ratios": [0.5, 0, 0.5]}), "it must be shares above 0 with the sum 1"),
        (document(ONE | {"minimum": 17}), "features[0].minimum is 17.0; it must be at most maximum, 16.0"),
    ],
)
def test_a_wrong_reference_is_refused_by_the_name_of_its_field(data, words):
    with pytest.raises(ValueError) as caught:
        reference.parse(data)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("manifest.yaml", "reference: reference.json", "reference: none.json", "it must be a file of the bundle"),
        ("manifest.yaml", "shape: [2]", "shape: [2, 2]", "reference can't be used here"),
        ("manifest.yaml", "features: [x1, x2]", "features: [a, b]", "the manifest's input.features are ['a', 'b']"),
        ("reference.json", '"count": 4000', '"count": "many"', "reference.json: count is 'many'"),
    ],
)
def test_a_bundle_with_a_wrong_reference_is_refused(edit, name, old, new, words):
    with pytest.raises(BundleError) as caught:
        read(edit(name, old, new))
    assert "bundle simplemodel 1.0.0: " in str(caught.value) and words in str(caught.value)


def test_a_bundle_may_do_without_a_reference(bundle_dir, edit):
    edit("manifest.yaml", "reference: reference.json\n", "")
    (bundle_dir / "reference.json").unlink()
    write_sums(bundle_dir)
    assert read(bundle_dir).reference is None
    assert list(features.reference_metrics([read(bundle_dir)])) == []


# --- bundle_tool reference


@pytest.mark.parametrize(
    "text",
    [
        "label,x2,x1\n1,0.5,-1\n0,1.5,\n1,2.5,3\n",
        "-1,0.5\nnan,1.5\n3,2.5\n",
    ],
    ids=["by name", "in order"],
)
def test_the_tool_makes_a_reference_from_csv(bundle_dir, tmp_path, capsys, text):
    rows = tmp_path / "rows.csv"
    rows.write_text(text)
    assert bundle_tool.main(["reference", str(bundle_dir), str(rows)]) == 0
    assert capsys.readouterr().out.startswith("reference.json: 3 rows of x1, x2\n")
    x1, x2 = read(bundle_dir).reference.features
    assert (x1.mean, x1.minimum, x1.maximum, x2.mean) == (1.0, -1.0, 3.0, 1.5)


def test_the_tool_names_a_new_reference_in_the_manifest(bundle_dir, edit, tmp_path):
    edit("manifest.yaml", "reference: reference.json\n", "# the end")
    (bundle_dir / "reference.json").unlink()
    numpy.save(tmp_path / "rows.npy", numpy.array([[1, 2], [3, 4.1]]))
    assert bundle_tool.main(["reference", str(bundle_dir), str(tmp_path / "rows.npy")]) == 0
    assert (bundle_dir / "manifest.yaml").read_text().endswith("# the end\nreference: reference.json\n")
    # As float32 has it, which the model takes.
    assert read(bundle_dir).reference.features[1].maximum == numpy.float32(4.1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "rows.csv: is empty"),
        ("x1,x2\n", "rows.csv: has no rows"),
        ("x1,y\n1,2\n", "rows.csv: names 0 columns 'x2' in line 1"),
        ("x1,x2\n1,2\n1,red\n", "rows.csv: line 3: x2 is 'red'; it must be a number, or empty"),
        ("x1,x2\n1,2\n1\n", "rows.csv: line 3: x2 is missing"),
        ("1,2,3\n", "rows.csv: has 3 columns; the manifest's input has 2 features"),
        ("x1,x2\n1,inf\n", "rows.csv: x2 holds an infinite number"),
    ],
)
def test_the_tool_says_what_is_wrong_with_the_rows(bundle_dir, tmp_path, capsys, text, words):
    before = (bundle_dir / "reference.json").read_bytes()
    rows = tmp_path / "rows.csv"
    rows.write_text(text)
    assert bundle_tool.main(["reference", str(bundle_dir), str(rows)]) == 1
    assert words in capsys.readouterr().err
    assert (bundle_dir / "reference.json").read_bytes() == before


# --- counting


class Counted:
    """What is counted of one model's rows."""

    def __init__(self, directory, *listed: dict, dtype: str = "float32") -> None:
        self.metrics = Metrics(str(directory))
        found = reference.parse(document(*listed))
        # Files are shared between tests: each has a name of its own.
        self.model = directory.name
        self.counts = features.FeatureCounts(features.FeatureCounters(), self.model, dtype, found)
        self.names = [feature.name for feature in found.features]

    def __getitem__(self, key: tuple[str, str]) -> float:
        order = ["rows", "out_of_range", "above", "below", "squared"]
        return self._counted()[order.index(key[0]) * len(self.names) + self.names.index(key[1])]

    def bins(self, feature: str) -> list[float]:
        start = 5 * len(self.names) + self.names.index(feature) * reference.BINS
        return [number for number in self._counted()[start : start + reference.BINS] if number is not None]

    def _counted(self) -> list[float | None]:
        return [None if child is None else child._value.get() for child in self.counts._children]


@pytest.fixture
def counted(tmp_path):
    return lambda *listed, **options: Counted(tmp_path, *listed, **options)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_rows_are_counted_in_units_of_the_reference(counted, as_tensor):
    found = counted(ONE, CONSTANT)
    rows = [[10, 10.0], [14.0, 10.0], [6.0, 10.0], [8.0, 10.0], [3.0, 11.0]]
    found.counts.add(torch.tensor(rows) if as_tensor else rows)
    assert found["rows", "x"] == 0
    found.counts.fold()
    assert found["rows", "x"] == found["rows", "c"] == 5
    # (0, 2, -2, -1, -3.5) and (0, 0, 0, 0, 1)
    assert (found["above", "x"], found["below", "x"], found["squared", "x"]) == (2.0, 6.5, 21.25)
    assert (found["above", "c"], found["below", "c"], found["squared", "c"]) == (1.0, 0.0, 1.0)
    assert (found["out_of_range", "x"], found["out_of_range", "c"]) == (1, 1)
    # A value on an edge is in the bin above it.
    assert (found.bins("x"), found.bins("c")) == ([2, 1, 2], [])
    found.counts.fold()
    assert found["rows", "x"] == 5


def test_the_sums_agree_with_a_plain_count_however_rows_arrive(counted):
    chance = random.Random(3)
    values = [chance.gauss(11, 3) for _ in range(10_000)]
    found = counted(ONE | {"edges": [7, 8, 9, 10, 11, 12, 13, 14, 15], "ratios": [0.1] * 10}, dtype="float64")
    left = list(values)
    while left:
        size = chance.choice((1, 1, 1, 7, 5000))
        batch, left = [[value] for value in left[:size]], left[size:]
        found.counts.add(torch.tensor(batch, dtype=torch.float64) if chance.random() < 0.3 else batch)
    found.counts.fold()
    deviations = [(value - 10) / 2 for value in values]
    assert found["rows", "x"] == len(values)
    assert found["above", "x"] == pytest.approx(sum(d for d in deviations if d > 0))
    assert found["below", "x"] == pytest.approx(-sum(d for d in deviations if d < 0))
    assert found["squared", "x"] == pytest.approx(sum(d * d for d in deviations))
    assert found["out_of_range", "x"] == sum(not 4 <= value <= 16 for value in values)
    expected = [0] * 10
    for value in values:
        expected[sum(value >= edge for edge in range(7, 16))] += 1
    assert found.bins("x") == expected


def test_an_absurd_value_is_out_of_range_and_weighs_no_more_than_others_can(counted):
    found = counted(ONE, dtype="float64")
    found.counts.add([[1.7e308], [-1.7e308]])
    found.counts.fold()
    assert (found["above", "x"], found["below", "x"], found["squared", "x"]) == (1000, 1000, 2e6)
    assert found["out_of_range", "x"] == 2


@pytest.mark.parametrize(("dtype", "row"), [("int32", [12]), ("int64", [12]), ("bool", [True])])
def test_whole_numbers_and_truth_values_are_counted(counted, dtype, row):
    found = counted(ONE, dtype=dtype)
    found.counts.add([row])
    found.counts.fold()
    assert found["rows", "x"] == 1
    assert found["above", "x"] + found["below", "x"] == abs(row[0] - 10) / 2


def test_many_values_are_added_up_before_they_are_due(counted):
    found = counted(ONE)
    for rows in ([[10.0]] * 5000, torch.full((5000, 1), 10.0)):
        found.counts.add(rows)
        assert (len(found.counts._numbers), found.counts._tensors) == (0, [])
    found.counts.fold()
    assert found["rows", "x"] == 10_000


# --- the service


@pytest.fixture(scope="module")
def service():
    with tempfile.TemporaryDirectory(prefix="ms-", dir="/tmp") as name, running(Path(name), SHIPPED / "1.0.0") as found:
        found.wait_ready()
        yield found


def sums(service, name: str) -> float:
    found = service.metrics()
    return sum(value for key, value in found.items() if key.startswith(name))


def counted_rows(service, feature: str = "x1") -> float:
    return sums(service, f'model_feature_rows_total{{feature="{feature}",model="simplemodel"')


def test_every_series_is_there_before_the_first_request(service):
    names = ("rows", "missing", "invalid", "out_of_range", "deviation_positive", "deviation_negative")
    metrics = service.metrics()
    for name in (*(f"model_feature_{name}_total" for name in (*names, "deviation_squared")), "model_feature_center"):
        assert sum(key.startswith(f"{name}{{") for key in metrics) == 2
    assert sum(key.startswith("model_feature_bin_total{") for key in metrics) == 20
    assert sums(service, "model_feature_reference_bin_ratio{") == pytest.approx(2)
    # Twenty features in two colours are to stay below 2,000 series.
    assert sum(key.startswith("model_feature_") for key in metrics) <= 2000 / 20 / 2 * 2


def test_what_clients_ask_is_counted_and_nothing_else(service):
    before = counted_rows(service)
    service.predict([0.2, 0.6], X_Appliance_Probe="1")
    service.predict([[0.2, 0.6], [0.2, "x"]])
    service.predict([0.2, None])
    service.predict([0.2, None], X_Appliance_Probe="1")
    service.predict([[0.2, 0.6]] * 3)
    service.predict([100.0, 0.6], worker=1)
    service.wait_for(lambda: counted_rows(service) == before + 4, "counted")
    assert counted_rows(service, "x2") == before + 4
    assert sums(service, 'model_feature_out_of_range_total{feature="x1"') == 1
    assert sums(service, 'model_feature_invalid_total{feature="x2"') == 1
    assert sums(service, 'model_feature_missing_total{feature="x2"') == 1
    assert sums(service, 'model_feature_missing_total{feature="x1"') == 0
    assert sums(service, "model_feature_bin_total{") == 2 * counted_rows(service)


def test_a_probe_without_a_body_is_answered_as_the_first_example(service):
    before = counted_rows(service)
    examples = json.loads((SHIPPED / "1.0.0" / "examples.json").read_text())["examples"]
    status, _, body = service.ask("worker-0", "POST", "/predict", b"", X_Appliance_Probe="example")
    assert status == 200 and json.loads(body)["output"] == pytest.approx(examples[0]["response"]["output"], rel=1e-4)
    # Whoever asks without a body has made a mistake, also where it is the appliance.
    for headers in ({}, {"X_Appliance_Probe": "1"}):
        assert service.ask("worker-0", "POST", "/predict", b"", **headers)[0] == 400
    service.predict([0.2, 0.6])
    service.wait_for(lambda: counted_rows(service) == before + 1, "counted")


def test_a_replaced_worker_goes_on_counting(short_dir):
    with running(short_dir, SHIPPED / "1.0.0", MODEL_WORKERS=1) as found:
        found.wait_ready()
        found.predict([0.2, 0.6])
        found.wait_for(lambda: counted_rows(found) == 1, "counted")
        # Children come oldest first, and the control process is older than any worker.
        os.kill(found.children()[1], signal.SIGKILL)
        found.wait_for(lambda: found.health()[1]["workers"] == {"wanted": 1, "ready": 1, "restarts": 1}, "replaced")
        found.predict([0.2, 0.6])
        found.wait_for(lambda: counted_rows(found) == 2, "counted again")


def test_the_control_process_needs_neither_pytorch_nor_numpy():
    code = "import sys, model_server.control; sys.exit(bool({'torch', 'numpy'} & sys.modules.keys()))"
    environment = {"PYTHONPATH": str(ROOT / "service")}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
