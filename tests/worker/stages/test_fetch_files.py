"""file URLs stay under their roots, whatever lies or happens there."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.clock import Deadline
from worker.errors import Code, ItemError
from worker.stages.fetch_files import FileSource, file_path

SECRET = b"root:x:0:0"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """root/ is allowed; outside/ and rootless/ are not."""
    for folder in ("root/sub", "outside", "rootless"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "root/a.png").write_bytes(b"image")
    (tmp_path / "root/sub/ü b#c?d%20.png").write_bytes(b"odd")
    (tmp_path / "outside/secret").write_bytes(SECRET)
    (tmp_path / "rootless/secret").write_bytes(SECRET)
    return tmp_path


def read(tree: Path, url: str, max_bytes: int = 100) -> bytes:
    return FileSource([tree / "root"], max_bytes).read(url, Deadline(5))


def code(tree: Path, url: str, max_bytes: int = 100) -> Code:
    with pytest.raises(ItemError) as error:
        read(tree, url, max_bytes)
    assert str(tree) not in error.value.message and "\n" not in error.value.message
    return error.value.code


def test_files_under_the_root_are_read(tree: Path) -> None:
    assert read(tree, f"file://{tree}/root/a.png") == b"image"
    assert read(tree, f"file://localhost{tree}/root/a.png") == b"image"
    assert read(tree, f"FILE:{tree}/root/a.png") == b"image"
    assert read(tree, f"file://{tree}/root/sub/../a.png") == b"image"
    assert read(tree, (tree / "root/sub/ü b#c?d%20.png").as_uri()) == b"odd"


def test_names_that_are_not_utf8_are_read(tree: Path) -> None:
    name = os.fsencode(tree) + b"/root/\xff\xfe.png"
    with open(name, "wb") as file:
        file.write(b"bytes")
    assert read(tree, Path(os.fsdecode(name)).as_uri()) == b"bytes"


def test_the_root_may_be_a_link_and_links_inside_are_followed(tree: Path) -> None:
    (tree / "alias").symlink_to(tree / "root")
    (tree / "root/link.png").symlink_to("a.png")
    (tree / "root/up").symlink_to(tree / "root/sub")
    assert FileSource([tree / "alias"], 100).read(f"file://{tree}/root/link.png", Deadline(5)) == b"image"
    assert read(tree, f"file://{tree}/alias/link.png") == b"image"
    assert read(tree, f"file://{tree}/root/up/../a.png") == b"image"


@pytest.mark.parametrize(
    "path",
    [
        "/outside/secret",
        "/root/../outside/secret",
        "/root/%2e%2e/outside/secret",
        "/root/sub/../../outside/secret",
        "/rootless/secret",
        "/root/..",
        "/root/link",
        "/root/chain",
        "/root/folder/secret",
        "/outside/missing",
        "/root/folder/missing",
    ],
)
def test_nothing_outside_the_root_is_read_nor_told_to_exist(tree: Path, path: str) -> None:
    (tree / "root/link").symlink_to(tree / "outside/secret")
    (tree / "root/chain").symlink_to("link")
    (tree / "root/folder").symlink_to("../outside")
    assert code(tree, f"file://{tree}{path}") is Code.FETCH_DENIED


@pytest.mark.parametrize(
    "url",
    [
        "file://{root}/a.png%00.jpg",
        "file://{root}/a.png?x",
        "file://{root}/a.png#x",
        "file://server{root}/a.png",
        "file://127.0.0.1{root}/a.png",
        "file:a.png",
        "file://",
        "file:///",
        "file://../root/a.png",
        "file:////etc/passwd",
        "file:///proc/self/environ",
    ],
)
def test_other_forms_are_denied(tree: Path, url: str) -> None:
    assert code(tree, url.replace("{root}", f"{tree}/root")) is Code.FETCH_DENIED


def test_percent_is_decoded_once(tree: Path) -> None:
    assert file_path("file:///a/%2541") == "/a/%41"
    (tree / "root/%2e%2e").mkdir()
    assert code(tree, f"file://{tree}/root/%252e%252e/outside/secret") is Code.FETCH_NOT_FOUND


def test_without_roots_nothing_is_read(tree: Path) -> None:
    with pytest.raises(ItemError) as error:
        FileSource([], 100).read(f"file://{tree}/root/a.png", Deadline(5))
    assert error.value.code is Code.FETCH_DENIED


@pytest.mark.parametrize("path", ["missing.png", "sub/missing/x.png", "a.png/x", "x" * 300, "broken"])
def test_missing(tree: Path, path: str) -> None:
    (tree / "root/broken").symlink_to("nowhere")
    assert code(tree, f"file://{tree}/root/{path}") is Code.FETCH_NOT_FOUND


def test_only_regular_files(tree: Path) -> None:
    os.mkfifo(tree / "root/fifo")
    (tree / "root/loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(tree / "root")  # socket paths are short
        try:
            listener.bind("socket")
        finally:
            os.chdir(here)
        for name in ("fifo", "socket", "sub", ".", "loop"):
            assert code(tree, f"file://{tree}/root/{name}") is Code.FETCH_DENIED, name
    assert FileSource([Path("/dev")], 100).read  # a root of devices gives none of them away
    with pytest.raises(ItemError, match="regular"):
        FileSource([Path("/dev")], 100).read("file:///dev/zero", Deadline(5))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable(tree: Path) -> None:
    (tree / "root/a.png").chmod(0)
    assert code(tree, f"file://{tree}/root/a.png") is Code.FETCH_DENIED


def test_the_limit_holds_for_files_and_for_those_that_claim_to_be_empty(tree: Path) -> None:
    (tree / "root/full").write_bytes(b"x" * 100)
    (tree / "root/over").write_bytes(b"x" * 101)
    assert len(read(tree, f"file://{tree}/root/full")) == 100
    assert code(tree, f"file://{tree}/root/over") is Code.FETCH_TOO_LARGE
    source = FileSource([Path("/proc")], 10)  # st_size is 0 there
    with pytest.raises(ItemError) as error:
        source.read("file:///proc/cpuinfo", Deadline(5))
    assert error.value.code is Code.FETCH_TOO_LARGE


def test_a_link_put_in_between_resolving_and_opening_is_not_followed(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.path.realpath

    def slow_realpath(path: str, **options: bool) -> str:
        resolved = real(path, **options)
        if resolved.endswith("sub/x.png") and not (tree / "root/sub").is_symlink():
            (tree / "root/sub").rename(tree / "root/was")
            (tree / "root/sub").symlink_to(tree / "outside")
        return resolved

    (tree / "root/sub/x.png").write_bytes(b"image")
    (tree / "outside/x.png").write_bytes(SECRET)
    monkeypatch.setattr(os.path, "realpath", slow_realpath)
    assert code(tree, f"file://{tree}/root/sub/x.png") in (Code.FETCH_NOT_FOUND, Code.FETCH_DENIED)
    assert (tree / "root/sub").is_symlink()  # the race did take place


def test_a_link_that_changes_all_the_time_never_leaks(tree: Path) -> None:
    stop = threading.Event()

    def swap() -> None:
        spare = tree / "root/spare"
        while not stop.is_set():
            for target in ("a.png", "../outside/secret"):
                spare.symlink_to(target)
                spare.rename(tree / "root/flip")

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        for _ in range(500):
            try:
                assert read(tree, f"file://{tree}/root/flip") == b"image"
            except ItemError as error:
                assert error.code in (Code.FETCH_DENIED, Code.FETCH_NOT_FOUND)
    finally:
        stop.set()
        swapper.join()


def test_no_descriptor_is_left_open(tree: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for url in ("root/a.png", "root/missing", "root/sub", "outside/secret", "root/a.png/x"):
        for _ in range(5):
            try:
                read(tree, f"file://{tree}/{url}", max_bytes=3)
            except ItemError:
                continue
    assert len(os.listdir("/proc/self/fd")) == before


@given(
    parts=st.lists(
        st.sampled_from(["..", ".", "", "sub", "root", "outside", "secret", "a.png", "out", "%2e%2e", "%2f"]), max_size=8
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
def test_no_path_leads_to_the_secret(tree: Path, parts: list[str]) -> None:
    link = tree / "root/out"
    if not link.is_symlink():
        link.symlink_to(tree / "outside")
    try:
        assert read(tree, f"file://{tree}/root/" + "/".join(parts)) == b"image"
    except ItemError as error:
        assert error.code in (Code.FETCH_DENIED, Code.FETCH_NOT_FOUND)
