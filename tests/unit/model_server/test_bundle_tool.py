"""The tool with which bundles are made and checked."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from bundle_making import ROOT, SHIPPED
from model_server import bundle_tool, loading
from model_server.bundle import read
from safetensors.torch import save_file

CODE = SHIPPED / "1.0.0" / "model.py"
WEIGHTS = SHIPPED / "1.0.0" / "weights.pth"
HIDDEN = ("--arguments", "{hidden: 4}")
ROW = '{"data": [0.2, 0.6]}'


@pytest.fixture
def tool(capsys):
    """Runs the tool; its exit status and what it printed."""

    def run(*arguments) -> tuple[int, str]:
        status = bundle_tool.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


def test_it_is_a_program(bundle_dir):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "service")}
    command = [sys.executable, "-m", "model_server.bundle_tool"]
    done = subprocess.run([*command, "check", bundle_dir], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line[:3] for line in lines[:-1]] == ["ok "] * 3 and "model_server.serve" in lines[-1]
    (bundle_dir / "model.py").write_text("")
    done = subprocess.run([*command, "check", bundle_dir], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: bundle simplemodel 1.0.0: model.py doesn't match")
    assert subprocess.run([*command, "chekc"], env=environment, capture_output=True).returncode == 2


def test_files_beside_the_bundle_dont_count(bundle_dir, tmp_path):
    with open(bundle_dir / "model.py", "a") as file:
        file.write("\nimport helper\n")
    (tmp_path / "helper.py").write_text("")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "service")}
    command = [sys.executable, "-m", "model_server.bundle_tool"]
    for name in ("sums", "check"):
        done = subprocess.run(
            [*command, name, bundle_dir], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
    assert done.returncode == 1 and "No module named 'helper'" in done.stderr


def test_init_makes_what_the_host_takes(tool, tmp_path):
    target = tmp_path / "churn" / "2.0"
    status, text = tool(
        "init", target, "--name", "churn", "--version", "2.0", "--model", CODE, "--weights", WEIGHTS, *HIDDEN,
        "--input-shape", "2", "--features", "x1,x2", "--example", ROW,
    )  # fmt: skip
    assert status == 0 and '{"data":[0.2,0.6]}  ->  {"output":0.63' in text
    assert yaml.safe_load((target / "manifest.yaml").read_text()) == {
        "name": "churn",
        "version": "2.0",
        "description": "The model churn.",
        "entry": {"file": "model.py", "class": "SimpleModel", "arguments": {"hidden": 4}},
        "weights": "weights.pth",
        "input": {"shape": [2], "dtype": "float32", "features": ["x1", "x2"]},
        "output": {"shape": [1], "dtype": "float32"},
        "batching": {"max_rows": 64},
    }
    assert tool("check", target)[0] == 0
    assert [path.name for path in tmp_path.rglob(".*")] == []
    # Readable for the container's user, whatever made it.
    assert target.stat().st_mode & 0o777 == 0o755


def test_init_of_torchscript_and_safetensors(tool, tmp_path):
    module = loading.load(read(SHIPPED / "1.0.0")).default.module
    torch.jit.save(torch.jit.script(module), tmp_path / "net.pt")
    save_file(module.state_dict(), tmp_path / "net.safetensors")
    shape = ("--input-shape", "2")
    script = ("--weights", tmp_path / "net.pt", "--weights-format", "torchscript")
    assert tool("init", tmp_path / "a", "--name", "a", *script, *shape)[0] == 0
    safe = ("--model", CODE, "--weights", tmp_path / "net.safetensors", *HIDDEN)
    assert tool("init", tmp_path / "b", "--name", "b", *safe, *shape)[0] == 0
    answers = [read(tmp_path / name).examples[0].response["output"] for name in "ab"]
    assert answers[0] == pytest.approx(answers[1])


def test_init_of_code_alone_with_other_files(tool, tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom factor import FACTOR\n\nclass Net(torch.nn.Module):\n"
        "    def forward(self, rows):\n        return (rows * FACTOR, )[0].to(torch.float64)\n"
    )
    (tmp_path / "factor.py").write_text("FACTOR = 3\n")
    status, text = tool(
        "init", tmp_path / "out", "--name", "net", "--model", tmp_path / "net.py", "--file", tmp_path / "factor.py",
        "--input-shape", "", "--input-dtype", "int64", "--example", '{"data": [2, 4]}',
    )  # fmt: skip
    assert status == 0, text
    bundle = read(tmp_path / "out")
    assert (bundle.output.shape, bundle.output.dtype) == ((), "float64")
    assert bundle.examples[0].response == {"output": [6.0, 12.0]}


def test_init_of_a_model_with_a_postprocess(tool, tmp_path):
    code = (
        CODE.read_text()
        + "\n    def postprocess(self, output):\n        return [{'p': p} for [p] in output.tolist()]\n"
    )
    (tmp_path / "model.py").write_text(code)
    made = ("--name", "a", "--model", tmp_path / "model.py", "--weights", WEIGHTS, *HIDDEN, "--input-shape", "2")
    assert tool("init", tmp_path / "out", *made)[0] == 0
    assert read(tmp_path / "out").output.kind == "json"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", CODE, "--weights", WEIGHTS, "--input-shape", "2"], "entry.arguments: TypeError"),
        (["--model", CODE, *HIDDEN, "--weights", WEIGHTS], "--input-shape"),
        (["--model", CODE, *HIDDEN, "--weights", WEIGHTS, "--input-shape", "3"], "running the example: RuntimeError"),
        (["--model", CODE, *HIDDEN, "--weights", WEIGHTS, "--input-shape", "2", "--class", "X"], "has no class X"),
        (["--model", CODE, *HIDDEN, "--weights", CODE, "--input-shape", "2"], "two of the files are called model.py"),
        (["--model", CODE, *HIDDEN, "--input-shape", "2", "--example", "{x"], "example request isn't JSON"),
        (["--model", CODE, *HIDDEN, "--input-shape", "2", "--example", '{"data": 1}'], "example request: data must"),
        (["--model", Path("/none.py"), "--input-shape", "2"], "/none.py: No such file"),
        ([], "nothing to run"),
    ],
)
def test_init_that_fails_leaves_nothing_behind(tool, tmp_path, options, words):
    status, text = tool("init", tmp_path / "out", "--name", "net", *options)
    assert status == 1 and words in text and text.startswith("error: ") and text.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_init_never_overwrites(tool, tmp_path):
    (tmp_path / "out").mkdir()
    status, text = tool("init", tmp_path / "out", "--name", "net", "--model", CODE, "--input-shape", "2")
    assert status == 1 and "exists already" in text and list((tmp_path / "out").iterdir()) == []


def test_sums_after_a_change(tool, bundle_dir):
    with open(bundle_dir / "model.py", "a") as file:
        file.write("\n# changed\n")
    assert tool("check", bundle_dir)[0] == 1
    assert tool("sums", bundle_dir)[0] == 0
    assert tool("check", bundle_dir)[0] == 0


@pytest.mark.parametrize(
    "text", ["models: [", "models: 5", "models: [[one]]", "models: [../one]", "models: [model.py]"]
)
def test_sums_of_a_wrong_manifest(tool, bundle_dir, text):
    (bundle_dir / "one").mkdir()
    (bundle_dir.parent / "one").mkdir()
    (bundle_dir / "manifest.yaml").write_text(text)
    assert tool("sums", bundle_dir)[0] == 0
    status, text = tool("check", bundle_dir)
    assert status == 1 and "manifest.yaml" in text
    assert list((bundle_dir.parent / "one").iterdir()) == []


def test_record_adds_what_the_model_answers(tool, bundle_dir, tmp_path):
    (tmp_path / "row.json").write_text('{"data": [[1, 1], [0, 0]]}')
    assert tool("record", bundle_dir, "--request", tmp_path / "row.json", "--tolerance", "0.01")[0] == 0
    added = json.loads((bundle_dir / "examples.json").read_text())["examples"][6]
    assert added["request"] == {"data": [[1, 1], [0, 0]]} and added["tolerance"] == 0.01
    assert added["response"]["output"] == [pytest.approx(0.5937, abs=1e-3), pytest.approx(0.1148, abs=1e-3)]
    assert tool("check", bundle_dir)[0] == 0


def test_record_begins_the_examples(tool, bundle_dir):
    (bundle_dir / "examples.json").unlink()
    assert tool("record", bundle_dir, "--request", ROW)[0] == 0
    assert len(read(bundle_dir).examples) == 1


def test_record_of_a_wrong_request_changes_nothing(tool, bundle_dir):
    before = {path.name: path.read_bytes() for path in bundle_dir.iterdir()}
    status, text = tool("record", bundle_dir, "--request", '{"data": ["x", 1]}')
    assert status == 1 and "data[0] must be a number" in text
    assert {path.name: path.read_bytes() for path in bundle_dir.iterdir()} == before


def test_several_models(tool, tmp_path):
    for name in ("one", "two"):
        made = ("--model", CODE, "--weights", WEIGHTS, *HIDDEN, "--input-shape", "2")
        assert tool("init", tmp_path / "both" / name, "--name", name, *made)[0] == 0
    both = tmp_path / "both"
    fields = {"name": "both", "version": "1", "description": "Two.", "models": ["one", "two"]}
    (both / "manifest.yaml").write_text(yaml.safe_dump(fields))
    shutil.copy(both / "one" / "examples.json", both)
    assert tool("sums", both) == (0, f"SHA256SUMS lists 12 files\nNext: bundle_tool check {both}\n")
    status, text = tool("check", both)
    assert status == 0 and "ok  two 1.0.0: examples: 1 of 1 reproduce" in text
    status, text = tool("record", both, "--request", ROW)
    assert status == 1 and "in the directory of one of them" in text


def test_check_reports_speed(tool, edit):
    directory = edit("manifest.yaml", "batching:", "speed: {torchscript: true}\nbatching:")
    status, text = tool("check", directory)
    assert status == 0 and "torchscript: true, within 0.001 of the original" in text
