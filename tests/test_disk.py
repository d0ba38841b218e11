"""Where nothing can be mounted the tests of full disks are skipped, but not in CI: there they would prove nothing."""

import pytest

from . import disk


@pytest.mark.parametrize(("ci", "ends"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
@pytest.mark.parametrize("command", ["false", "no-such-command"])
def test_a_file_system_that_cannot_be_mounted(tmp_path, monkeypatch, ci, ends, command):
    monkeypatch.setenv("CI", ci)
    real = disk.subprocess.run
    monkeypatch.setattr(disk.subprocess, "run", lambda words, **more: real([command, *words[1:]], **more))
    with pytest.raises(ends, match="here"), disk.small_disk(tmp_path / "disk", "1m"):
        pass
