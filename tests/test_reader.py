"""Inputs of a batch of work: from what was fetched ahead, from afar directly, or from the cache."""

import random
from pathlib import Path

import pytest

from merger.ahead import Ahead
from merger.errors import ReadFailed, SourceChanged
from merger.expression import ByteRange, File
from merger.reader import OpenFiles, on_disk, part_of, read
from merger.remote import Remote
from merger.storage.disk import page_aligned

KIB, MIB = 1 << 10, 1 << 20
DATA = random.Random(0).randbytes(6 * MIB)


class Elsewhere(Remote):
    """A file whose bytes are at hand, and a note of what was asked of it."""

    def __init__(self, cache: Path, name: str = "a") -> None:
        self._cache, self._name = cache, name
        self.requests: list[tuple[int, int]] = []
        self.downloads = 0

    @property
    def address(self) -> str:
        return f"test://{self._name}"

    def fetch(self, start: int, into: memoryview) -> None:
        if start + len(into) > len(DATA):
            raise ReadFailed("ends early", where=self.address)
        self.requests.append((start, start + len(into)))
        into[:] = DATA[start : start + len(into)]

    def download(self) -> Path:
        self.downloads += 1
        path = self._cache / self._name
        path.write_bytes(DATA)
        return path


@pytest.fixture
def remote(tmp_path) -> Elsewhere:
    return Elsewhere(tmp_path)


@pytest.fixture
def file(remote) -> File:
    return File(remote, len(DATA), 0, "")


def part(file: File, start: int, stop: int) -> ByteRange:
    return ByteRange(file, start, stop, "U8")


def contents(inputs: OpenFiles, *wanted: ByteRange) -> list[bytes]:
    values = read(wanted, inputs, page_aligned(8 * MIB))
    return [values[one].tobytes() for one in wanted]


def expected(*wanted: ByteRange) -> list[bytes]:
    return [DATA[one.start : one.stop] for one in wanted]


# ---- from afar ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (4095, 4097), (123, 3 * MIB + 7), (6 * MIB - 1, 6 * MIB), (8, 8)])
def test_without_anything_fetched_ahead_a_range_is_asked_for(remote, file, start, stop):
    inputs = OpenFiles()
    assert contents(inputs, part(file, start, stop)) == [DATA[start:stop]]
    assert remote.requests == ([(start, stop)] if stop > start else [])
    inputs.close()


def test_neighbours_are_asked_for_at_once(remote, file):
    wanted = [part(file, start, start + 1000) for start in (0, 1000, 5000, 500_000)]
    assert contents(OpenFiles(), *wanted) == expected(*wanted)
    assert remote.requests == [(0, 6000), (500_000, 501_000)]


def test_ranges_of_several_files_do_not_mix(tmp_path, file):
    other = File(Elsewhere(tmp_path, "b"), len(DATA), 0, "")
    wanted = [part(file, 0, 10), part(other, 10, 20), part(file, 20, 30)]
    assert contents(OpenFiles(), *wanted) == expected(*wanted)


def test_what_cannot_be_read_is_told(file):
    with pytest.raises(ReadFailed, match="ends early") as caught:
        contents(OpenFiles(), part(file, len(DATA) - 5, len(DATA) + 5))
    assert caught.value.where == "test://a"


# ---- fetched ahead ------------------------------------------------------------------------------------


def test_what_was_fetched_ahead_is_not_asked_for_again(remote, file):
    wanted = [part(file, 0, 3 * MIB), part(file, 5 * MIB, 5 * MIB + 10)]
    inputs = OpenFiles()
    inputs.ahead = Ahead([("block", wanted)], 64 * MIB)
    with inputs.serving("block"):
        assert contents(inputs, *wanted) == expected(*wanted)
        assert contents(inputs, part(file, 10, 100), part(file, MIB, 2 * MIB)) == [DATA[10:100], DATA[MIB : 2 * MIB]]
    inputs.close()
    assert sum(stop - start for start, stop in remote.requests) == 3 * MIB + 10


def test_a_range_across_several_requests_is_put_together(remote, file):
    inputs = OpenFiles()
    inputs.ahead = Ahead([("block", [part(file, 100, 5 * MIB)])], 4 * MIB)
    with inputs.serving("block"):
        for start, stop in ((100, 5 * MIB), (MIB - 1, MIB + 1), (4096, 4 * MIB)):
            assert contents(inputs, part(file, start, stop)) == [DATA[start:stop]]
    inputs.close()
    assert len(remote.requests) == 5  # none above a MiB, each once
    assert sum(stop - start for start, stop in remote.requests) == 5 * MIB - 100


def test_what_lies_outside_of_what_was_fetched_is_asked_for(remote, file):
    inputs = OpenFiles()
    inputs.ahead = Ahead([("block", [part(file, MIB, 2 * MIB)])], 64 * MIB)
    with inputs.serving("block"):
        for start, stop in ((0, 10), (3 * MIB, 4 * MIB), (2 * MIB - 10, 2 * MIB + 10), (MIB - 10, 3 * MIB)):
            assert contents(inputs, part(file, start, stop)) == [DATA[start:stop]]
    inputs.close()


def test_after_a_block_nothing_of_it_is_used(remote, file):
    inputs = OpenFiles()
    inputs.ahead = Ahead([("block", [part(file, 0, MIB)])], 64 * MIB)
    with inputs.serving("block"):
        pass
    assert contents(inputs, part(file, 0, 10)) == [DATA[:10]]
    assert remote.requests[-1] == (0, 10)
    inputs.close()


# ---- cached -------------------------------------------------------------------------------------------


def test_a_cached_file_is_downloaded_once_and_read_from_the_disk(remote, file):
    inputs = OpenFiles(cached={"test://a"})
    wanted = [part(file, 0, 10), part(file, MIB, 2 * MIB)]
    assert contents(inputs, *wanted) == expected(*wanted)
    assert contents(inputs, *wanted) == expected(*wanted)
    inputs.close()
    assert (remote.downloads, remote.requests) == (1, [])


def test_a_download_of_another_size_has_changed(remote):
    wrong = File(remote, len(DATA) + 1, 0, "")
    with pytest.raises(SourceChanged):
        contents(OpenFiles(cached={"test://a"}), part(wrong, 0, 10))


def test_files_are_closed_while_there_are_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(OpenFiles, "LIMIT", 3)
    files = [File(Elsewhere(tmp_path, f"{i}"), len(DATA), 0, "") for i in range(6)]
    inputs = OpenFiles(cached={f"test://{i}" for i in range(6)})
    for file in [*files, *files]:
        assert contents(inputs, part(file, 5, 10)) == [DATA[5:10]]
        assert len(inputs._open) <= 3
    inputs.close()


# ---- without a run ------------------------------------------------------------------------------------


def test_parts_of_files_here_and_elsewhere(tmp_path, remote, file):
    path = tmp_path / "here"
    path.write_bytes(DATA)
    for one in (file, File(path, len(DATA), 0, "")):
        assert part_of(one, 100, 200) == DATA[100:200]
        with pytest.raises(ReadFailed, match="ends early"):
            part_of(one, len(DATA) - 1, len(DATA) + 1)


def test_the_whole_file_on_the_disk(tmp_path, remote, file):
    path = tmp_path / "here"
    path.write_bytes(DATA)
    assert on_disk(File(path, len(DATA), 0, "")) == path
    assert on_disk(file).read_bytes() == DATA
    assert remote.downloads == 1


def test_remote_files_are_what_their_addresses_are(tmp_path):
    a, same, b = Elsewhere(tmp_path), Elsewhere(tmp_path), Elsewhere(tmp_path, "sub/b")
    assert (a == same, a == b, a == "test://a") == (True, False, False)
    assert len({a, same, b}) == 2
    assert (str(b), b.name) == ("test://sub/b", "b")


def test_nothing_is_read_of_a_block_without_bytes(remote, file):
    inputs = OpenFiles()
    inputs.ahead = Ahead([("block", [part(file, 8, 8)])], 64 * MIB)
    with inputs.serving("block"):
        assert contents(inputs, part(file, 8, 8)) == [b""]
    inputs.close()
    assert [request for request in remote.requests if request[0] != request[1]] == []
