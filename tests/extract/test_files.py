import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from relish.cache.errors import BackboneError, MissingExtraError
from relish.extract import files as files_module
from relish.extract.files import BackboneFiles, find_backbone


def find(model, gguf_file=None, revision=None):
    return find_backbone(model, gguf_file=gguf_file, revision=revision)


def message(*arguments, error=BackboneError, **options):
    with pytest.raises(error) as caught:
        find(*arguments, **options)
    return str(caught.value)


@pytest.fixture
def own(tiny_model, tmp_path):
    """A model folder to change."""
    return shutil.copytree(tiny_model("llama"), tmp_path / "mine")


@pytest.fixture
def gguf(tmp_path):
    path = tmp_path / "small.gguf"
    path.write_bytes(b"GGUF and so on")
    return path


# Hashes


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("model.safetensors", "weights"),
        ("config.json", "config"),
        ("modeling_own.py", "config"),
        ("tokenizer.json", "tokenizer"),
        ("tokenizer_config.json", "tokenizer"),
        ("chat_template.jinja", "tokenizer"),
        ("vocab.json", "tokenizer"),
        ("merges.txt", "tokenizer"),
        ("spiece.model", "tokenizer"),
    ],
)
def test_a_file_that_changes_changes_its_hash_and_no_other(own, file, part):
    before = find(own).hashes()
    with (own / file).open("ab") as handle:
        handle.write(b" ")
    after = find(own).hashes()
    assert [name for name in before if before[name] != after[name]] == [part]


def test_files_that_make_no_difference_leave_the_hashes(own):
    before = find(own).hashes()
    (own / "README.md").write_text("about")
    (own / "generation_config.json").write_text("{}")
    (own / "optimizer.pt").write_bytes(b"state")
    for table in ("vocabulary-test.csv", "tokenizer-study.jsonl", "merges.csv", "vocab-train.tsv"):
        (own / table).write_text("text")
    assert find(own).hashes() == before


def test_hashes_are_those_of_the_content_wherever_the_folder_is(own, tiny_model):
    assert find(own).hashes() == find(tiny_model("llama")).hashes()
    assert all(len(value) == 64 for value in find(own).hashes().values())


def test_old_weights_count_where_there_are_no_safetensors(own):
    safe = find(own).hashes()["weights"]
    (own / "pytorch_model.bin").write_bytes(b"old")
    assert find(own).hashes()["weights"] == safe
    (own / "model.safetensors").unlink()
    assert find(own).hashes()["weights"] != safe


def test_a_folder_without_weights_is_refused(own):
    (own / "model.safetensors").unlink()
    with pytest.raises(BackboneError) as caught:
        find(own).hashes()
    assert str(caught.value) == f"{own} holds no weights: expected model*.safetensors or pytorch_model*.bin"
    (own / "small.gguf").write_bytes(b"GGUF")
    with pytest.raises(BackboneError, match=r"pytorch_model\*\.bin, and for a GGUF name the file: small\.gguf$"):
        find(own).hashes()


def test_a_gguf_is_weights_configuration_and_tokenizer_in_one(gguf):
    found = find(gguf)
    assert (found.folder, found.gguf_file, found.name, found.revision) == (gguf.parent, gguf.name, gguf.name, None)
    before = found.hashes()
    gguf.write_bytes(b"GGUF and other")
    after = find(gguf).hashes()
    assert all(before[name] != after[name] for name in ("weights", "config", "tokenizer"))


def test_a_gguf_in_a_folder_is_named_by_its_file(gguf):
    assert find(gguf.parent, gguf_file=gguf.name) == find(gguf)


def test_a_gguf_that_is_renamed_is_the_same(gguf):
    before = find(gguf).hashes()
    assert find(gguf.rename(gguf.with_name("other.gguf"))).hashes() == before


# Local models


def test_a_folder_is_named_by_its_last_part_and_never_by_its_path(own, monkeypatch):
    monkeypatch.chdir(own)
    for given in (own, str(own), f"{own}{os.sep}", "."):
        assert find(given).name == "mine"
        assert find(given).revision is None


def test_a_tilde_is_the_home(own, monkeypatch):
    monkeypatch.setenv("HOME", str(own.parent))
    monkeypatch.setenv("USERPROFILE", str(own.parent))
    assert find("~/mine").name == "mine"


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    assert message(tmp_path) == (
        f"{tmp_path} is not a model: it has no config.json. For a GGUF file, give the file itself as the model"
    )


def test_a_gguf_that_is_not_in_the_folder_is_refused(gguf):
    assert message(gguf.parent, gguf_file="other.gguf") == f"{gguf.parent} holds no file 'other.gguf'"


def test_a_revision_of_a_folder_is_refused(own):
    assert message(own, revision="main") == (
        f"--revision is for models of the hub, and {own} is a folder on this machine"
    )


def test_a_path_that_is_not_there_is_no_model(tmp_path):
    path = tmp_path / "absent"
    assert message(path) == f"no such model: {str(path)!r} is no folder or GGUF file on this machine, and no hub id"


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_gguf_needs_its_packages(gguf, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert message(gguf, error=MissingExtraError) == (
        f"Reading a GGUF file needs the package {package!r}, which is not installed; "
        "run: pip install 'relish-llm[extract]'"
    )


# The hub, without a network: its cache as huggingface_hub lays it out

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_home(tiny_model, tmp_path):
    home = tmp_path / "hf"
    repository = home / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "refs", repository / "blobs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for path in tiny_model("llama").iterdir():
        data = path.read_bytes()
        large = path.suffix == ".safetensors"
        name = hashlib.sha256(data).hexdigest() if large else hashlib.sha1(data).hexdigest()
        (repository / "blobs" / name).write_bytes(data)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", name))
    return home


def offline(home, model, revision=None):
    """What `find_backbone` gives in a process of its own, which reads HF_HOME and HF_HUB_OFFLINE as it starts."""
    code = (
        "import json, sys\n"
        "from relish.cache.errors import RelishError\n"
        "from relish.extract.files import find_backbone\n"
        "model, revision = json.loads(sys.argv[1])\n"
        "try:\n"
        "    found = find_backbone(model, gguf_file=None, revision=revision)\n"
        "    print(json.dumps([found.name, found.revision, found.hashes()]))\n"
        "except RelishError as error:\n"
        "    print(json.dumps(str(error)))\n"
    )
    import json

    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([model, revision])],
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return json.loads(done.stdout)


def test_a_model_of_the_hub_is_found_offline_with_its_commit(hub_home, tiny_model):
    expected = ["org/tiny", COMMIT, find(tiny_model("llama")).hashes()]
    assert offline(hub_home, "org/tiny") == expected
    assert offline(hub_home, "org/tiny", COMMIT) == expected


def test_a_model_that_the_hub_does_not_give_is_no_model(hub_home):
    found = offline(hub_home, "org/absent")
    assert found.startswith(
        "no such model: 'org/absent' is no folder or GGUF file on this machine, and the hub did not give it: "
    )
    assert "\n" not in found
    assert "the hub did not give it" in offline(hub_home, "org/tiny", "other-branch")


def test_a_large_file_of_the_hubs_cache_is_not_read_to_hash_it(hub_home, monkeypatch):
    snapshot = hub_home / "hub" / "models--org--tiny" / "snapshots" / COMMIT
    found = BackboneFiles(snapshot, None, "org/tiny", COMMIT)
    expected = found.hashes()
    blob = (snapshot / "model.safetensors").resolve()
    blob.write_bytes(b"not read")
    assert found.hashes() == expected
    assert files_module._hash_file(blob) == hashlib.sha256(b"not read").hexdigest()
