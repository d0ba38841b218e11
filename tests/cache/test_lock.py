import errno
import os
import subprocess
import sys
from dataclasses import replace

import pytest

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


def test_a_file_system_without_locks_is_written_without_one_and_says_so_on_stderr(tmp_path):
    code = (
        "import errno, sys; from pathlib import Path; from relish.cache import lock\n"
        "from relish.cache.errors import CacheError\n"
        "def none(_descriptor): raise OSError(errno.ENOLCK, 'No locks available')\n"
        "lock._lock = none\n"
        "with lock.lock_folder(Path(sys.argv[1]), CacheError): print('held')\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "new")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "held\n")
    assert done.stderr == (
        f"note: locks are not supported in {tmp_path / 'new'}; make sure that only one process writes there\n"
    )


@pytest.mark.parametrize("step", ["mkdir", "open"])
@pytest.mark.parametrize(
    ("number", "way"),
    [(errno.ENOSPC, "free space"), (errno.EACCES, "make the folder writable"), (errno.EIO, "see to that")],
)
def test_a_folder_that_cannot_be_locked_is_named_with_the_way_out(tmp_path, monkeypatch, step, number, way):
    def refuse(*_arguments, **_options):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, step, refuse)
        with pytest.raises(CacheError) as caught, lock_folder(tmp_path / "new", CacheError):
            pass
    assert str(caught.value) == (
        f"{tmp_path / 'new'} cannot be written ({os.strerror(number)}); {way}, or choose another one"
    )


def test_a_writer_refuses_a_manifest_that_changed_since_it_was_opened(make, tmp_path):
    folder = make.write(tmp_path / "c")
    writer = make.open_writer(folder)
    replace(load_manifest(folder), task="stsb").save(folder)
    with pytest.raises(CacheError, match="was changed by another process; run the command again"), writer.writing():
        pass
