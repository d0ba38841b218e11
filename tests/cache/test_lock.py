import errno
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from relish.cache import lock
from relish.cache.errors import CacheError
from relish.cache.lock import lock_folder
from relish.cache.manifest import load_manifest


def test_a_second_writer_is_refused_while_the_first_is_at_work(tmp_path):
    code = (
        "import sys; from pathlib import Path; from relish.cache.errors import CacheError\n"
        "from relish.cache.lock import lock_folder\n"
        "with lock_folder(Path(sys.argv[1]), CacheError):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        message = f"another process is writing into {tmp_path}; wait until it is done"
        with pytest.raises(CacheError, match=message), lock_folder(tmp_path, CacheError):
            pass
        other.kill()
    with lock_folder(tmp_path, CacheError):  # a dead process holds nothing
        assert (tmp_path / ".lock").exists()


def test_a_file_system_without_locks_is_written_without_one(tmp_path, monkeypatch):
    def none(_descriptor):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock, "_lock", none)
    with lock_folder(tmp_path / "new", CacheError):
        assert (tmp_path / "new").is_dir()


def test_a_writer_refuses_a_manifest_that_changed_since_it_was_opened(make, tmp_path):
    folder = make.write(tmp_path / "c")
    writer = make.open_writer(folder)
    replace(load_manifest(folder), task="stsb").save(folder)
    with pytest.raises(CacheError, match="was changed by another process; run the command again"), writer.writing():
        pass
