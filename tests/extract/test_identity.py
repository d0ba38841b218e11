"""What is refused and what only noted when an extraction goes on with something else than it was begun with."""

import json
import shutil

import pytest

from relish.cache.errors import CacheError
from relish.cache.manifest import load_manifest
from relish.extract import pipeline
from relish.extract.files import BackboneFiles
from relish.extract.pipeline import extract_cache
from relish.extract.settings import ExtractSettings

from ..heard import Heard


@pytest.fixture
def extract(tiny_model, tiny_rows, tmp_path):
    model = shutil.copytree(tiny_model("llama"), tmp_path / "model")

    def run(**changes):
        options = {"model": model, "data": {"train": tiny_rows(6)}, "label_range": (0.0, 5.0), "device": "cpu"}
        heard = Heard()
        extract_cache(tmp_path / "c", ExtractSettings(**{**options, **changes}), progress=heard)
        return heard.notes

    run()
    run.model, run.folder = model, tmp_path / "c"
    return run


def refusal(call, **changes):
    with pytest.raises(CacheError) as caught:
        call(**changes)
    assert str(caught.value).endswith(". Extract into another folder, or use the same settings to go on.")
    return str(caught.value)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_another_revision(extract, monkeypatch, tiny_rows, tmp_path):
    """The same hub id at two commits."""

    def hub(commit):
        monkeypatch.setattr(
            pipeline, "find_backbone", lambda *_args, **_more: BackboneFiles(extract.model, None, "org/model", commit)
        )

    hub("a" * 40)
    shutil.rmtree(extract.folder)
    extract()
    hub("b" * 40)
    assert f"revision is '{'a' * 40}' there and '{'b' * 40}' here" in refusal(extract)


def test_another_tokenizer_file(extract):
    edit(extract.model / "tokenizer_config.json", clean_up_tokenization_spaces=True)
    found = refusal(extract)
    assert "tokenizer is '" in found
    assert "weights" not in found


def test_another_padding_side(extract):
    """It stands in the tokenizer's configuration. Hidden states would be the same: rows are always padded right."""
    edit(extract.model / "tokenizer_config.json", padding_side="right")
    assert "tokenizer is '" in refusal(extract)


def test_other_weights(extract):
    path = extract.model / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "weights is '" in refusal(extract)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"prompt": "Film: {text}"}, "prompt is '{text}' there and 'Film: {text}' here"),
        ({"max_length": 64}, "max_length is 128 there and 64 here"),
        ({"layers": (1,)}, "layers is (3,) there and (1,) here"),
        ({"dtype": "float32"}, "dtype is 'bfloat16' there and 'float32' here"),
        ({"compute_dtype": "bfloat16"}, "compute_dtype is 'float32' there and 'bfloat16' here"),
    ],
)
def test_other_settings(extract, changes, difference):
    assert difference in refusal(extract, **changes)


def test_another_version_of_transformers(extract, monkeypatch):
    import transformers

    there = transformers.__version__
    monkeypatch.setattr(transformers, "__version__", "9.9.9")
    assert f"transformers is {there!r} there and '9.9.9' here" in refusal(extract)


def test_several_differences_are_all_named(extract):
    found = refusal(extract, dtype="float32", max_length=64)
    assert "max_length is 128" in found
    assert "dtype is 'bfloat16'" in found


def test_other_versions_of_torch_and_relish_and_another_device_are_noted(extract, monkeypatch, tiny_rows):
    made_by = load_manifest(extract.folder).made_by
    monkeypatch.setattr(pipeline, "made_by", lambda _: {"relish": "9.1", "torch": "9.2", "device": "H100"})
    notes = extract(data={"test": tiny_rows(4, 1)})
    assert [text for text in notes if text.startswith("note: ")] == [
        f"note: the cache was begun with {name} {made_by[name]}, and this is {value}; hidden states may differ in "
        "their last bits"
        for name, value in (("relish", "9.1"), ("torch", "9.2"), ("device", "H100"))
    ]
    assert load_manifest(extract.folder).made_by == made_by


def test_what_does_not_matter_is_not_a_word(extract, tiny_rows):
    assert extract(batch_tokens=7, on_nonfinite="skip") == []
    before = (extract.folder / "manifest.json").read_bytes()
    extract.model.rename(extract.model.with_name("elsewhere"))
    assert extract(model=extract.model.with_name("elsewhere")) == []
    assert (extract.folder / "manifest.json").read_bytes() == before
