"""The forms that a model may come in: weights in each format, code alone, several in one bundle."""

import base64
import errno
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bundle_making import SHIPPED, write_sums
from model_server import authoring, loading
from model_server import bundle as bundle_module
from model_server.bundle import BundleError, read
from rollout import bundles
from safetensors.torch import save_file


@pytest.fixture
def manifest(bundle_dir):
    """Changes fields of the bundle's manifest; None takes one out."""

    def change(directory: Path = bundle_dir, **fields) -> Path:
        path = directory / "manifest.yaml"
        document = yaml.safe_load(path.read_bytes()) | fields
        kept = {key: value for key, value in document.items() if value is not None}
        path.write_text(yaml.safe_dump(kept))
        write_sums(directory)
        return directory

    return change


def rejected(directory: Path, *words: str) -> None:
    with pytest.raises(BundleError) as caught:
        loading.load(read(directory))
    for word in words:
        assert word in str(caught.value)


def eager() -> torch.nn.Module:
    return loading.load(read(SHIPPED / "1.0.0")).default.module


def test_torchscript_needs_no_entry(bundle_dir, manifest):
    (bundle_dir / "model.py").unlink()
    (bundle_dir / "weights.pth").unlink()
    torch.jit.save(torch.jit.script(eager()), bundle_dir / "model.pt")
    manifest(entry=None, weights="model.pt", weights_format="torchscript")
    assert len(loading.load(read(bundle_dir)).default.bundle.examples) == 6


def test_torchscript_that_is_taken_for_a_state_dict(bundle_dir, manifest):
    torch.jit.save(torch.jit.script(eager()), bundle_dir / "weights.pth")
    rejected(manifest(), "weights.pth can't be loaded", "weights_format: torchscript")


def test_torchscript_with_an_entry(manifest):
    rejected(manifest(weights_format="torchscript"), "entry can't be used with torchscript")


def test_torchscript_that_is_none(manifest):
    rejected(manifest(weights_format="torchscript", entry=None), "weights.pth is not usable TorchScript")


def test_safetensors(bundle_dir, manifest):
    (bundle_dir / "weights.pth").unlink()
    save_file(eager().state_dict(), bundle_dir / "weights.safetensors")
    manifest(weights="weights.safetensors")
    assert loading.load(read(bundle_dir)).default.bundle.weights_format == "safetensors"
    save_file({"other": torch.zeros(1)}, bundle_dir / "weights.safetensors")
    write_sums(bundle_dir)
    rejected(bundle_dir, "weights.safetensors doesn't fit SimpleModel", "other")
    (bundle_dir / "weights.safetensors").write_bytes(b"nonsense")
    write_sums(bundle_dir)
    rejected(bundle_dir, "weights.safetensors can't be loaded as safetensors")


def test_pickle_under_another_format_is_not_run(bundle_dir, manifest):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (bundle_dir.parent / "touched",))

    for name, form in (("w.safetensors", "safetensors"), ("w.pt", "state_dict"), ("w.pt", "torchscript")):
        torch.save(Evil(), bundle_dir / name)
        rejected(manifest(weights=name, weights_format=form, entry=None if form == "torchscript" else ENTRY), name)
        (bundle_dir / name).unlink()
    assert not (bundle_dir.parent / "touched").exists()


ENTRY = {"file": "model.py", "class": "SimpleModel", "arguments": {"hidden": 4}}


def test_checkpoint_says_how_to_save_it(bundle_dir, manifest):
    torch.save({"epoch": 3, "state_dict": eager().state_dict()}, bundle_dir / "weights.pth")
    rejected(manifest(), "checkpoint with the state dict under 'state_dict'", "torch.save(")


def test_whole_model_says_how_to_save_it(bundle_dir, manifest):
    torch.save(torch.nn.Linear(2, 1), bundle_dir / "weights.pth")
    rejected(manifest(), "more than tensors", "torch.save(model.state_dict(), PATH)")


def test_weights_of_an_unknown_suffix(bundle_dir, manifest):
    (bundle_dir / "weights.pth").rename(bundle_dir / "weights.bin")
    rejected(manifest(weights="weights.bin"), "weights_format is missing", "state_dict, safetensors, torchscript")
    loading.load(read(manifest(weights_format="state_dict")))


def test_code_alone(bundle_dir, manifest):
    (bundle_dir / "weights.pth").unlink()
    (bundle_dir / "model.py").write_text(
        "import torch\n\nclass Sum(torch.nn.Module):\n    def forward(self, rows):\n        return rows.sum(1, True)\n"
    )
    example = {"request": {"data": [1, 2]}, "response": {"output": 3.0}, "tolerance": 0}
    (bundle_dir / "examples.json").write_text(json.dumps({"examples": [example]}))
    bundle = read(manifest(weights=None, entry={"file": "model.py", "class": "Sum"}))
    assert bundle.weights_format == "none"
    assert loading.load(bundle).default.predict([[[3, 4], [5, 6]]]) == [[7, 11]]


def test_model_without_code(manifest):
    rejected(manifest(entry=None), "entry is missing")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("weights_format", "pickle", ["weights_format is 'pickle'", "state_dict"]),
        ("device", "cuda", ["device is 'cuda'", "cpu, auto"]),
        ("device", ["cpu"], ["device is ['cpu']"]),
        ("speed", {"torchscript": 1}, ["speed.torchscript is 1", "true or false"]),
        ("speed", {"dtype": "float16"}, ["speed.dtype is 'float16'"]),
        ("speed", {"quantize": "static"}, ["speed.quantize is 'static'"]),
        ("speed", {"tolerance": -1}, ["speed.tolerance is -1"]),
        ("speed", {"fast": True}, ["speed.fast is not a known field"]),
        ("speed", {"dtype": "bfloat16", "quantize": "dynamic"}, ["exclude each other"]),
        ("handler", {"file": "none.py"}, ["handler.file is 'none.py'"]),
        ("handler", {"file": "model.py", "class": "a b"}, ["handler.class is 'a b'"]),
        ("input", {"kind": "sound"}, ["input.kind is 'sound'", "bytes"]),
        ("input", {"kind": "bytes", "shape": [1]}, ["input.shape is not a known field"]),
        ("output", {"kind": "bytes"}, ["output.kind is 'bytes'", "json"]),
        ("entry", {"file": "model.py", "class": "SimpleModel", "args": {}}, ["entry.args is not a known field"]),
    ],
)
def test_manifest_fields(manifest, field, value, words):
    rejected(manifest(**{field: value}), *words)


def test_handler_excludes_what_it_would_ignore(manifest):
    handler = {"file": "model.py"}
    rejected(manifest(handler=handler, speed={"channels_last": True}), "speed can't be used with handler")
    rejected(manifest(handler=handler, speed=None, device="auto"), "device is 'auto'")


def test_gpu_excludes_variants_for_the_cpu(manifest):
    rejected(manifest(device="auto", speed={"quantize": "dynamic"}), "speed.quantize")


def test_device_auto_without_a_gpu(manifest, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    models = loading.load(read(manifest(device="auto")))
    loading.to_device(models)
    loading.probe(models)
    assert models.default.device == "cpu"


def test_device_auto_moves_the_model(manifest, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    moved = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: moved.append(device))
    loading.to_device(loading.load(read(manifest(device="auto"))))
    loading.to_device(loading.load(read(manifest(device="cpu"))))
    assert moved == ["cuda"]


def test_bytes_need_a_preprocess(manifest):
    rejected(manifest(input={"kind": "bytes"}, reference=None), "input.kind is 'bytes'", "preprocess")


def test_model_imports_files_of_its_own_bundle(bundle_dir, edit):
    (bundle_dir / "layers.py").write_text("SCALE = 1.0\n")
    edit("model.py", "return self.layers(rows)", "import layers\n        return self.layers(rows) * layers.SCALE")
    models = loading.load(read(bundle_dir))
    # Also when the file is imported only now, in a worker.
    loading.probe(models)
    assert not list(bundle_dir.rglob("__pycache__"))


LACKS = [OSError(errno.EIO, "of the disk"), OSError(errno.EMFILE, "of files"), MemoryError("of memory")]


def failing(error: BaseException):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("error", LACKS, ids=str)
@pytest.mark.parametrize("weights_format", ["state_dict", "safetensors", "torchscript"])
def test_what_the_machine_lacks_for_weights_is_no_fault_of_the_bundle(manifest, monkeypatch, weights_format, error):
    place = {"state_dict": "torch.load", "safetensors": "safetensors.torch.load_file", "torchscript": "torch.jit.load"}
    bundle = read(manifest(weights_format=weights_format, entry=None if weights_format == "torchscript" else ENTRY))
    monkeypatch.setattr(place[weights_format], failing(error))
    with pytest.raises(type(error), match=str(error.args[-1])):
        loading.load(bundle)
    # What another start won't change.
    monkeypatch.setattr(place[weights_format], failing(OSError(errno.EACCES, "of rights")))
    with pytest.raises(BundleError, match="of rights"):
        loading.load(bundle)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("import torch", "import torch\n\n{}"),
        ("super().__init__()", "super().__init__()\n        {}"),
        ("return self.layers(rows)", "{}"),
    ],
    ids=["import", "class", "prediction"],
)
@pytest.mark.parametrize("error", ["OSError(5, 'of the disk')", "OSError(24, 'of files')", "MemoryError('of memory')"])
def test_what_the_machine_lacks_for_code_is_no_fault_of_the_bundle(bundle_dir, edit, old, new, error):
    edit("model.py", old, new.format(f"raise {error}"))
    with pytest.raises((OSError, MemoryError), match="of (the disk|files|memory)"):
        loading.load(read(bundle_dir))
    edit("model.py", error, "OSError(13, 'of rights')")
    rejected(bundle_dir, "of rights")


MIXES = "return self.layers(rows)", "return self.layers(rows).softmax(0)"
POSTPROCESS = (
    "return self.layers(rows)",
    """return self.layers(rows)

    def postprocess(self, output):
        return [{"score": value, "rows": 1} for value in output.flatten().tolist()]""",
)


def one_row(directory: Path, output: Any, tolerance: float = 1e-4) -> None:
    example = {"request": {"data": [0.2, 0.6]}, "response": {"output": output}, "tolerance": tolerance}
    (directory / "examples.json").write_text(json.dumps({"examples": [example]}))


def test_answers_that_depend_on_their_neighbours(bundle_dir, edit, manifest):
    edit("model.py", *MIXES)
    one_row(bundle_dir, 1.0)
    rejected(
        manifest(), "example 0", "in a batch of 64 rows", "depend on their neighbours", "batching: {max_batch_rows: 1}"
    )
    assert loading.load(read(manifest(batching={"max_rows": 64, "max_batch_rows": 1})))


def test_answers_of_a_postprocess_that_depend_on_their_neighbours(bundle_dir, edit, manifest):
    edit("model.py", *POSTPROCESS)
    one_row(bundle_dir, {"score": 0.63179, "rows": 1})
    assert loading.load(read(manifest(output={"kind": "json"})))
    edit("model.py", '"rows": 1', '"rows": len(output)')
    rejected(bundle_dir, "depend on their neighbours")


def test_examples_whose_rows_do_not_go_together(bundle_dir, edit, manifest):
    # They fail in a batch, and the executor then runs them one by one.
    edit(
        "model.py",
        "def forward(",
        """def preprocess(self, rows):
        return torch.stack([torch.frombuffer(bytearray(row), dtype=torch.uint8) for row in rows])

    def forward(""",
    )
    edit("model.py", "return self.layers(rows)", "return rows.float().mean(1, keepdim=True)")
    examples = [
        {"request": {"data": base64.b64encode(row).decode()}, "response": {"output": row[0]}, "tolerance": 0}
        for row in (b"aaa", b"bb")
    ]
    (bundle_dir / "examples.json").write_text(json.dumps({"examples": examples}))
    assert loading.load(read(manifest(input={"kind": "bytes"}, reference=None)))


def test_rounding_in_a_batch_is_no_dependence(bundle_dir, edit, manifest):
    # A sum in another order, of large numbers, with a tolerance that allows for nothing.
    edit("model.py", *POSTPROCESS)
    edit("model.py", "self.layers(rows)", "(rows * 0 + 1e6 + (0.25 if len(rows) > 1 else 0))[:, :1]")
    one_row(bundle_dir, {"score": 1e6, "rows": 1}, 0)
    assert loading.load(read(manifest(output={"kind": "json"})))
    one_row(bundle_dir, {"score": 1e6, "rows": 1}, 0)
    edit("model.py", "0.25", "2e4")
    rejected(bundle_dir, "depend on their neighbours")


@pytest.mark.parametrize(
    ("alone", "together", "agree"),
    [
        ([1e5, 0.3], [1e5, 0.9], False),
        ([1e5, 0.3], [1e5 + 0.5, 0.9], False),
        ([-1e9, 0.3], [-1e9, 0.9], False),
        # What a sum of large numbers leaves.
        ([1e5, 0.3], [1e5 + 0.5, 0.35], True),
        ([50.0, 0.3], [50.04, 0.3002], True),
        ([50.0, 0.3], [50.06, 0.3], False),
    ],
)
@pytest.mark.parametrize("kind", ["tensor", "json"])
def test_rounding_is_judged_number_by_number(bundle_dir, edit, manifest, kind, alone, together, agree):
    edit("model.py", "self.layers(rows)", f"torch.tensor([{together} if len(rows) > 1 else {alone}] * len(rows))")
    if kind == "json":
        postprocess = "def postprocess(self, output):\n        return output.tolist()\n\n    "
        edit("model.py", "def forward(", f"{postprocess}def forward(")
    one_row(bundle_dir, alone, 1e-6)
    manifest(output={"kind": "json"} if kind == "json" else {"shape": [2], "dtype": "float32"})
    if agree:
        assert loading.load(read(bundle_dir))
    else:
        rejected(bundle_dir, "depend on their neighbours")


def test_a_wide_tolerance_holds_for_both_answers(bundle_dir, edit, manifest):
    edit("model.py", "self.layers(rows)", "(rows * 0 + (1.09 if len(rows) > 1 else 0.91))[:, :1]")
    one_row(bundle_dir, 1.0, 0.1)
    assert loading.load(read(manifest()))
    edit("model.py", "1.09", "1.12")
    rejected(bundle_dir, "depend on their neighbours")


def test_answers_that_are_never_the_same_are_not_blamed_on_neighbours(bundle_dir, edit, manifest):
    # Each call gets its number. The example is the fifth, after those of the warm-up.
    edit("model.py", "super().__init__()", "super().__init__()\n        self.calls = 0")
    edit("model.py", "return self.layers(rows)", "self.calls += 1\n        return (rows * 0 + self.calls)[:, :1]")
    one_row(bundle_dir, 5.0)
    assert loading.load(read(manifest()))


@pytest.fixture
def collection(tmp_path):
    """A bundle with two models, one and two, which have files of the same names; two's outputs are doubled."""
    directory = tmp_path / "both"
    for name, factor in (("one", 1), ("two", 2)):
        shutil.copytree(SHIPPED / "1.0.0", directory / name)
        part = directory / name
        (part / "scale.py").write_text(f"FACTOR = {factor}\n")
        code = (part / "model.py").read_text().replace("import torch\n", "import torch\nfrom scale import FACTOR\n")
        (part / "model.py").write_text(code.replace("self.layers(rows)", "self.layers(rows) * FACTOR"))
        text = (part / "manifest.yaml").read_text().replace("name: simplemodel", f"name: {name}")
        (part / "manifest.yaml").write_text(text)
        examples = json.loads((part / "examples.json").read_text())
        examples["examples"] = examples["examples"][:1]
        examples["examples"][0]["response"]["output"] *= factor
        (part / "examples.json").write_text(json.dumps(examples))
        write_sums(part)
    shutil.copy(directory / "one" / "examples.json", directory)
    fields = {"name": "both", "version": "2.0", "description": "Both.", "models": ["one", "two"]}
    (directory / "manifest.yaml").write_text(yaml.safe_dump(fields))
    write_sums_of_all(directory)
    return directory


def write_sums_of_all(directory: Path) -> None:
    authoring.write_sums(directory)


def test_several_models(collection):
    bundle = read(collection)
    assert (bundle.name, bundle.version, bundle.directory) == ("both", "2.0", collection)
    assert [model.name for model in bundle.models] == ["one", "two"]
    assert len({bundle.digest, *(model.digest for model in bundle.models)}) == 3
    models = loading.load(bundle)
    assert models.default is models.find("one")
    [[once]], [[twice]] = (model.predict([[[0.2, 0.6]]]) for model in models.all)
    assert twice == pytest.approx(2 * once)


def test_references_of_more_features_than_can_be_watched(collection, monkeypatch):
    monkeypatch.setattr(bundle_module, "MOST_WATCHED", 4)
    assert read(collection).models[1].reference
    monkeypatch.setattr(bundle_module, "MOST_WATCHED", 3)
    with pytest.raises(BundleError, match="have 4 features together; at most 3 can be watched"):
        read(collection)


def test_imports_that_would_fail_in_the_workers(collection):
    path = collection / "two" / "model.py"
    code = path.read_text().replace("from scale import FACTOR\n", "")
    path.write_text(code.replace("return self", "from scale import FACTOR\n        return self"))
    write_sums_of_all(collection)
    rejected(collection, "bundle two 1.0.0", "No module named 'scale'", "at the top")


def test_rollout_engine_takes_several_models(collection, tmp_path):
    directory = tmp_path / "bundles" / "both" / "2.0"
    shutil.copytree(collection, directory)
    bundle = bundles.verify(tmp_path / "bundles", directory)
    assert bundle.digest == read(collection).digest
    assert len(bundles.load_examples(directory, bundle.digest)) == 1


def test_examples_of_the_whole_are_tested_on_the_default_model(collection):
    path = collection / "examples.json"
    path.write_text(path.read_text().replace("0.63", "0.53"))
    write_sums_of_all(collection)
    rejected(collection, "example 1 doesn't reproduce")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("- two", "- one", ["models is ['one', 'one']", "differ"]),
        ("- one\n- two", "- a-one\n- A_one", ["models is ['a-one', 'A_one']", "more than case, - and _"]),
        ("- two", "- three", ["models names three", "not a directory"]),
        ("- two", "- ../two", ["models is", "match"]),
        ("models:\n- one\n- two", "models: []", ["models is []"]),
        ("description:", "weights: x\ndescription:", ["weights is not a known field"]),
    ],
)
def test_wrong_lists_of_models(collection, old, new, words):
    path = collection / "manifest.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    # Only the sums of the whole: what it lists needn't exist.
    lines = (collection / "SHA256SUMS").read_text().splitlines()
    kept = [line for line in lines if not line.endswith("  manifest.yaml")]
    kept.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  manifest.yaml")
    (collection / "SHA256SUMS").write_text("\n".join(kept) + "\n")
    rejected(collection, *words)


def test_model_under_another_name(collection):
    path = collection / "two" / "manifest.yaml"
    path.write_text(path.read_text().replace("name: two", "name: one"))
    write_sums_of_all(collection)
    rejected(collection, "bundle both 2.0: two: manifest.yaml: name is 'one'", "'two'")


def test_several_models_within_several(collection):
    shutil.copy(collection / "two" / "manifest.yaml", collection / "two" / "old.yaml")
    inner = collection / "two" / "one"
    shutil.copytree(collection / "one", inner)
    fields = {"name": "two", "version": "1", "description": "x", "models": ["one"]}
    (collection / "two" / "manifest.yaml").write_text(yaml.safe_dump(fields))
    write_sums_of_all(collection)
    rejected(collection, "two: manifest.yaml: models can't be used here")


def test_changed_file_of_one_of_several(collection):
    with open(collection / "two" / "weights.pth", "ab") as file:
        file.write(b"x")
    rejected(collection, "two/weights.pth doesn't match its checksum")
