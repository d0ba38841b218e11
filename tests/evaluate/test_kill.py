import os
import shutil

import pytest

from ..killed import run_script


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_report_killed_at_any_step_or_moment_holds_old_or_new_files_whole(cache, runs, tmp_path):
    (tmp_path / "runs").mkdir()
    for name in ("relish-L1-seed0", "relish-L2-seed0"):
        shutil.copytree(runs / name, tmp_path / "runs" / name)
    killed, states = run_script("evaluate", cache, tmp_path, 8)
    assert killed > 15  # six files are written, then renamed
    assert states == "[0, 1, 2, 3, 4, 5, 6]"
