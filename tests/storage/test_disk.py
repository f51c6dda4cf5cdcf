import os
import resource
import signal
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merger.errors import ReadFailed, SourceChanged, WriteFailed
from merger.storage.disk import (
    PAGE,
    InputFile,
    OutputFile,
    page_aligned,
    round_up,
    sync_folder,
    write_atomically,
)

SIZE = 40 * PAGE + 123  # of the files that are read


@contextmanager
def mounted(kind, folder, *options):
    """A file system of its own at `folder`; skips where this user may not mount one."""
    done = subprocess.run(["mount", "-t", kind, *options, "none", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount {kind} here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="module", params=["disk", "memory", "plain"])
def place(request, tmp_path_factory):
    """Folders on the disk, in memory (tmpfs), and where there is no direct access and nothing to reserve (ramfs)."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "disk":
        yield folder
    elif request.param == "plain":
        with mounted("ramfs", folder):
            yield folder
    else:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
            yield Path(memory)


@pytest.fixture
def full_disk(tmp_path):
    """A disk of one mebibyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    with mounted("tmpfs", folder, "-o", "size=1m"):
        yield folder


@pytest.fixture
def patience():
    """Gives up on a test that would never end."""

    def give_up(*_):
        raise AssertionError("still not done")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(3)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@contextmanager
def file_size_limit(size):
    """The system refuses to write past `size` bytes of any file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def random_bytes(size, seed=0):
    return np.random.default_rng(seed).bytes(size)


def put(path, content):
    """A file that is on the disk, so that the page cache can let go of it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return path


def forget(path, start=0, size=0):
    """Let the page cache drop the file, or a part of it."""
    handle = os.open(path, os.O_RDONLY)
    os.posix_fadvise(handle, start, size, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def buffer_for(size):
    return page_aligned(size + 2 * PAGE)


def read(file, start, stop):
    return file.read(start, stop, buffer_for(stop - start)).tobytes()


def handles_on(path):
    """How many descriptors of this process point at the file or below the folder.

    Not all descriptors: those of other tests' threads come and go meanwhile.
    """
    links = []
    for handle in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the descriptor that lists the folder is gone by now
            links.append(str(handle.readlink()))
    return sum(link.startswith(str(path)) for link in links)


# ---- memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "rounded"), [(0, 0), (1, PAGE), (PAGE, PAGE), (PAGE + 1, 2 * PAGE)])
def test_sizes_are_rounded_up_to_pages(size, rounded):
    assert round_up(size) == rounded


@pytest.mark.parametrize("size", [0, 1, PAGE, PAGE + 1, 1 << 20])
def test_memory_starts_at_a_page_and_is_zero(size):
    memory = page_aligned(size)
    assert memory.ctypes.data % PAGE == 0
    assert memory.size % PAGE == 0
    assert memory.size >= max(size, 1)
    assert not memory.any()
    memory[:] = 1


# ---- reading ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def content():
    return random_bytes(SIZE)


@pytest.fixture(scope="module")
def source(place, content):
    return put(place / "source", content)


ranges = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(sorted)


@given(wanted=ranges, forgotten=ranges, cached=ranges)
def test_any_range_is_read_whatever_the_page_cache_holds(source, content, wanted, forgotten, cached):
    forget(source, forgotten[0], forgotten[1] - forgotten[0])
    with source.open("rb") as file:
        os.pread(file.fileno(), cached[1] - cached[0], cached[0])
    start, stop = wanted
    with InputFile(source, SIZE) as file:
        assert read(file, start, stop) == content[start:stop]


@pytest.mark.parametrize("start", [0, 1, PAGE - 1, PAGE, PAGE + 1, SIZE - PAGE - 1, SIZE - 123, SIZE - 1, SIZE])
@pytest.mark.parametrize("is_cached", [True, False])
def test_ranges_at_the_edges_are_read(source, content, start, is_cached):
    with InputFile(source, SIZE) as file:
        for stop in {start, min(start + 1, SIZE), min(start + PAGE, SIZE), SIZE}:
            if not is_cached:
                forget(source)
            assert read(file, start, stop) == content[start:stop]


def test_what_is_read_lies_in_the_buffer(source, content):
    buffer = buffer_for(100)
    with InputFile(source, SIZE) as file:
        values = file.read(5000, 5100, buffer)
    assert np.shares_memory(values, buffer)
    assert values.tobytes() == content[5000:5100]


def test_a_buffer_that_is_not_aligned_is_filled_all_the_same(source, content):
    # Where the disk refuses a direct read, the page cache takes over.
    forget(source)
    with InputFile(source, SIZE) as file:
        assert file.read(10, SIZE, buffer_for(SIZE)[1:]).tobytes() == content[10:]
        assert read(file, 0, SIZE) == content


def test_threads_read_side_by_side(source, content):
    starts = range(0, SIZE - 5000, 997)
    with InputFile(source, SIZE) as file, ThreadPoolExecutor(4) as pool:
        forget(source)
        parts = pool.map(lambda start: read(file, start, start + 5000), starts)
        assert list(parts) == [content[start : start + 5000] for start in starts]


@pytest.mark.parametrize("size", [0, 1, SIZE])
def test_a_whole_file_is_read(place, size):
    path = put(place / "whole", random_bytes(size))
    with InputFile(path, size) as file:
        assert read(file, 0, size) == path.read_bytes()


@pytest.mark.parametrize("planned", [SIZE - 1, SIZE + 1, 0])
def test_a_file_of_another_size_than_planned_is_refused(source, planned):
    with pytest.raises(SourceChanged, match="changed its size") as caught:
        InputFile(source, planned)
    assert caught.value.where == str(source)
    assert handles_on(source) == 0


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("left", [0, 1, PAGE, 20 * PAGE + 7])
@pytest.mark.parametrize("is_cached", [True, False])
def test_a_file_that_is_cut_while_it_is_read_is_an_error(place, left, is_cached):
    path = put(place / "cut", random_bytes(SIZE))
    with InputFile(path, SIZE) as file:
        os.truncate(path, left)
        if not is_cached:
            forget(path)
        with pytest.raises(ReadFailed, match=f"ends at {left:,} bytes") as caught:
            read(file, 0, SIZE)
        assert caught.value.where == str(path)
        with pytest.raises(ReadFailed):
            read(file, SIZE - 10, SIZE)
        assert read(file, 0, left) == path.read_bytes()


def test_a_file_that_the_disk_cannot_read_is_an_error(source):
    with InputFile(source, SIZE) as file:
        handle = os.open(source.parent, os.O_RDONLY)  # reading a folder fails as a broken disk does
        try:
            os.dup2(handle, file._cached)
            if file._direct is not None:
                os.dup2(handle, file._direct)
        finally:
            os.close(handle)
        with pytest.raises(ReadFailed, match="reading at 100: ") as caught:
            read(file, 100, 200)
        assert caught.value.where == str(source)


def test_a_closed_file_leaves_nothing_open(source):
    with InputFile(source, SIZE):
        assert handles_on(source) > 0
    assert handles_on(source) == 0


# ---- writing ------------------------------------------------------------------------------------------


def aligned(content):
    """The content in whole pages."""
    memory = page_aligned(round_up(len(content)))[: round_up(len(content))]
    memory[: len(content)] = np.frombuffer(content, np.uint8)
    return memory


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, PAGE + 1, SIZE])
def test_a_file_is_written_to_the_byte(place, size):
    path, content = place / "out", random_bytes(size)
    file = OutputFile(path, size)
    if size:
        file.write(aligned(content), 0)
    file.finish()
    file.close()
    assert path.read_bytes() == content


def test_pieces_are_written_in_any_order_by_any_thread(place):
    path, content = place / "out", random_bytes(SIZE)
    file = OutputFile(path, SIZE)
    starts = list(range(0, SIZE, 3 * PAGE))[::-1]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda start: file.write(aligned(content[start : start + 3 * PAGE]), start), starts))
    file.finish()
    file.close()
    assert path.read_bytes() == content


def test_a_piece_that_is_not_aligned_is_written_all_the_same(place):
    path, content = place / "out", random_bytes(4 * PAGE)
    piece = page_aligned(5 * PAGE)[1:][: 4 * PAGE]
    piece[:] = np.frombuffer(content, np.uint8)
    file = OutputFile(path, 4 * PAGE)
    file.write(piece, 0)
    file.write(aligned(content[:PAGE]), 0)
    file.finish()
    file.close()
    assert path.read_bytes() == content


def test_the_space_is_reserved_at_once(place):
    file = OutputFile(place / "out", SIZE)
    assert (place / "out").stat().st_blocks * 512 >= SIZE
    file.close()


def test_an_older_longer_file_leaves_nothing_behind(place):
    path = put(place / "out", random_bytes(SIZE))
    file = OutputFile(path, PAGE)
    file.write(aligned(b"new" * 100), 0)
    file.finish()
    file.close()
    assert path.read_bytes() == (b"new" * 100).ljust(PAGE, b"\0")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o000, 0o666)])
def test_a_file_may_be_read_by_whom_the_umask_allows(place, umask, mode):
    path = place / f"mode-{umask}"
    before = os.umask(umask)
    try:
        OutputFile(path, 10).close()
        write_atomically(path.with_suffix(".json"), b"{}")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode
    assert path.with_suffix(".json").stat().st_mode & 0o777 == mode


# ---- when there is no room ----------------------------------------------------------------------------


def test_a_full_disk_shows_at_the_start(full_disk):
    with pytest.raises(WriteFailed, match="cannot reserve 2,097,152 bytes: No space left on device") as caught:
        OutputFile(full_disk / "out", 2 << 20)
    assert caught.value.where == str(full_disk / "out")
    assert handles_on(full_disk) == 0
    assert list(full_disk.iterdir()) == []


def test_what_was_reserved_can_be_written_on_a_full_disk(full_disk):
    content = random_bytes(512 << 10)
    file = OutputFile(full_disk / "out", len(content))
    with pytest.raises(OSError, match="No space left"):
        (full_disk / "other").write_bytes(bytes(1 << 20))
    file.write(aligned(content), 0)
    file.finish()
    file.close()
    assert (full_disk / "out").read_bytes() == content


def test_a_file_too_large_for_the_system_shows_at_the_start(place):
    with file_size_limit(PAGE), pytest.raises(WriteFailed, match="cannot reserve 8,192 bytes: File too large"):
        OutputFile(place / "out", 2 * PAGE)


def test_a_write_that_fails_is_an_error_with_the_place(place):
    path = place / "out"
    file = OutputFile(path, 4 * PAGE)
    file.write(aligned(bytes(PAGE)), 0)
    with file_size_limit(2 * PAGE), pytest.raises(WriteFailed, match="writing at 8,192: File too large") as caught:
        file.write(aligned(bytes(2 * PAGE)), 2 * PAGE)
    assert caught.value.where == str(path)
    file.close()


def test_a_write_that_fails_halfway_is_an_error(place):
    file = OutputFile(place / "out", 4 * PAGE)
    with file_size_limit(PAGE + 10), pytest.raises(WriteFailed, match="File too large"):
        file.write(aligned(bytes(4 * PAGE)), 0)
    file.close()


def test_a_folder_that_is_not_there_is_an_error(place):
    with pytest.raises(WriteFailed, match="No such file or directory"):
        OutputFile(place / "nowhere" / "out", 10)


# ---- small files --------------------------------------------------------------------------------------


def test_a_small_file_replaces_the_one_before(place):
    path = place / "small.json"
    write_atomically(path, b"first")
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second"
    assert [it.name for it in place.iterdir() if "small.json" in it.name] == ["small.json"]


def test_a_small_file_that_finds_no_room_leaves_the_one_before(full_disk):
    path = full_disk / "small.json"
    write_atomically(path, b"first")
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, bytes(2 << 20))
    assert path.read_bytes() == b"first"
    assert [it.name for it in full_disk.iterdir()] == ["small.json"]


def test_names_are_synced_where_the_folder_is(place):
    sync_folder(place)
    with pytest.raises(FileNotFoundError):
        sync_folder(place / "nowhere")
