"""Faster variants: each answers like the original within its tolerance, or is refused."""

import json

import pytest
import torch
import yaml
from bundle_making import write_sums
from model_server import loading
from model_server.bundle import BundleError, read

CODE = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = torch.nn.Conv2d(3, 8, 3)
        self.linear = torch.nn.Linear(8 * 36, 4)

    def forward(self, rows):
        return self.linear(self.convolution(rows).relu().flatten(1))
"""


@pytest.fixture
def network(tmp_path):
    """Makes a bundle of a small convolutional network with the given ``speed``; examples that allow for it."""

    def make(code: str = CODE, **speed):
        rows = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        namespace = {"__name__": "net"}
        exec(code, namespace)
        with torch.inference_mode():
            outputs = namespace["Net"]().eval()(rows).tolist()
        (tmp_path / "model.py").write_text(code)
        requests = [({"data": rows[0].tolist()}, outputs[0]), ({"data": rows.tolist()}, outputs)]
        examples = [{"request": request, "response": {"output": out}, "tolerance": 0.5} for request, out in requests]
        (tmp_path / "examples.json").write_text(json.dumps({"examples": examples}))
        manifest = {
            "name": "net",
            "version": "1",
            "description": "A network.",
            "entry": {"file": "model.py", "class": "Net"},
            "input": {"shape": [3, 8, 8], "dtype": "float32"},
            "output": {"shape": [4], "dtype": "float32"},
            "batching": {"max_rows": 4},
            "speed": speed,
        }
        (tmp_path / "manifest.yaml").write_text(yaml.safe_dump(manifest))
        write_sums(tmp_path)
        return read(tmp_path)

    return make


def parts(module: torch.nn.Module) -> set[str]:
    return {type(part).__name__ for part in module.modules()}


def test_without_options_the_module_is_the_original(network):
    assert type(loading.load(network()).default.module).__name__ == "Net"


def test_torchscript(network):
    module = loading.load(network(torchscript=True)).default.module
    assert isinstance(module.inner, torch.jit.ScriptModule)


def test_channels_last(network):
    module = loading.load(network(channels_last=True)).default.module
    assert module.inner.convolution.weight.is_contiguous(memory_format=torch.channels_last)


def test_all_that_go_together(network):
    loading.load(network(torchscript=True, channels_last=True, quantize="dynamic", tolerance=0.1))


def test_bfloat16_keeps_the_promised_type(network):
    model = loading.load(network(dtype="bfloat16", tolerance=0.1)).default
    assert model.module.inner.linear.weight.dtype == torch.bfloat16
    [output] = model.predict([torch.rand(2, 3, 8, 8)], wants_tensor=True)
    assert output.dtype == torch.float32 and output.shape == (2, 4)


def test_quantised(network):
    bundle = network(quantize="dynamic", tolerance=0.1)
    module = loading.load(bundle).default.module
    assert "torch.ao" in type(module.inner.linear).__module__


@pytest.mark.parametrize(
    ("option", "value"), [("dtype", "bfloat16"), ("quantize", "dynamic")], ids=["bfloat16", "quantised"]
)
def test_deviation_beyond_the_tolerance(network, option, value):
    with pytest.raises(
        BundleError, match=rf"net 1: speed \({option}: {value}\): .* deviate by up to 0\.\d+.*allows 0\."
    ):
        loading.load(network(**{option: value}, tolerance=0))


def test_trace_that_goes_wrong(network):
    # A trace keeps the branch of the batch that it was made with: the largest example.
    code = CODE.replace("return self.linear(", "return (1 if len(rows) > 1 else 2) * self.linear(")
    with pytest.raises(BundleError, match=r"speed \(torchscript: true\): .* deviate"):
        loading.load(network(code, torchscript=True))


LOOP = """
import torch

class Net(torch.nn.Module):
    def forward(self, rows):
        out = torch.zeros(len(rows), 4)
        for i in range(len(rows)):
            out[i] = rows[i].sum()
        return out
"""


def test_trace_of_single_rows_that_is_wrong_in_batches(network, tmp_path):
    network(LOOP, torchscript=True)
    path = tmp_path / "examples.json"
    path.write_text(json.dumps({"examples": json.loads(path.read_text())["examples"][:1]}))
    write_sums(tmp_path)
    with pytest.raises(BundleError, match=r"speed \(torchscript: true\): outputs on the examples in a batch of 4 dev"):
        loading.load(read(tmp_path))


def test_channels_last_of_what_is_no_image(edit):
    directory = edit("manifest.yaml", "batching:", "speed: {channels_last: true}\nbatching:")
    with pytest.raises(BundleError, match=r"channels_last is for batches of shape .*not \[1, 2\]"):
        loading.load(read(directory))


def test_infinite_deviation(network):
    code = CODE.replace(".flatten(1))", ".flatten(1)) + (float('nan') if rows.dtype == torch.bfloat16 else 0)")
    with pytest.raises(BundleError, match="deviate by up to inf"):
        loading.load(network(code, dtype="bfloat16", tolerance=1000))


def test_pre_and_postprocessing_stay(edit, bundle_dir):
    methods = (
        "def preprocess(self, rows):\n        return torch.tensor(rows)\n\n"
        "    def postprocess(self, output):\n        return [{'p': p} for p in output.flatten().tolist()]\n\n"
        "    def forward("
    )
    edit("model.py", "def forward(", methods)
    edit("manifest.yaml", "batching:", "speed: {torchscript: true}\nbatching:")
    example = {"request": {"data": [0.2, 0.6]}, "response": {"output": {"p": 0.63}}, "tolerance": 0.1}
    (bundle_dir / "examples.json").write_text(json.dumps({"examples": [example]}))
    write_sums(bundle_dir)
    [[value]] = loading.load(read(bundle_dir)).default.predict([[[0.2, 0.6]]])
    assert value == {"p": pytest.approx(0.63, abs=0.01)}
