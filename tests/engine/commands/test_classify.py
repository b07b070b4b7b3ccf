"""`engine classify` in this process, on the null backend: rows, JSON, searching folders, bounded look-ahead."""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from engine import classify as classify_module
from engine.__main__ import main
from engine.backends.base import OutOfDeviceMemory, Outputs
from engine.backends.null import NullBackend
from engine.bundle import Bundle
from engine.commands import classify as command
from engine.commands import model_arguments, rows
from engine.detector import Detector
from engine.images import Limits
from tests.engine.bundles import random_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return random_bundle(tmp_path_factory.mktemp("bundle") / "1")


@pytest.fixture
def null(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> None:
    monkeypatch.setattr(model_arguments, "detector", lambda a: Detector.from_parts(bundle, NullBackend(), a.head, a.crops))


def png(value: int, size: tuple[int, int] = (300, 250)) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", size, (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def json_rows(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.usefixtures("null")
def test_json_has_a_line_for_every_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "black.png").write_bytes(png(0))
    (tmp_path / "white.png").write_bytes(png(255))
    (tmp_path / "broken.png").write_bytes(png(255)[:60])
    (tmp_path / "other.jpg").write_text("not an image")
    assert main(["classify", str(tmp_path), "--json"]) == 1
    black, broken, other, white = json_rows(capsys)
    assert [Path(row["path"]).name for row in (black, broken, other, white)] == [
        "black.png",
        "broken.png",
        "other.jpg",
        "white.png",
    ]
    low, high = 1 / (1 + np.exp(5)), 1 / (1 + np.exp(-5))
    assert black["score"] == pytest.approx(low) and black["label"] == "authentic"
    assert white["score"] == pytest.approx(high) and white["label"] == "ai_generated"
    assert set(white["heads"]) == {"linear", "knn", "ocsvm"} and white["crops"] == [white["score"]]
    assert (white["width"], white["height"], white["format"], white["frames"]) == (300, 250, "PNG", 1)
    assert white["error"] is None
    assert white["model"] == {"name": "random", "version": "1", "head": "linear", "backend": "null", "device": "cpu"}
    for row, code in ((broken, "decode.corrupt"), (other, "decode.unsupported")):
        assert row["score"] is None and row["label"] == "undetermined" and row["heads"] == {} and row["crops"] == []
        assert row["error"]["code"] == code and row["error"]["message"]
        assert set(row) == set(white)


@pytest.mark.usefixtures("null")
def test_all_well_is_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(png(10))
    assert main(["classify", str(tmp_path / "a.png"), str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0].split("\t") == ["score", "label", "size", "format", "path"]
    assert [line.split("\t")[1:4] for line in captured.out.splitlines()[1:]] == [["authentic", "300x250", "PNG"]] * 2
    assert captured.err == ""


@pytest.mark.usefixtures("null")
def test_head_and_crops_are_those_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(png(90))
    assert main(["classify", str(tmp_path), "--json", "--head", "ocsvm", "--crops", "five"]) == 0
    (row,) = json_rows(capsys)
    assert len(row["crops"]) == 5 and row["score"] == row["heads"]["ocsvm"] != row["heads"]["linear"]


@pytest.mark.usefixtures("null")
def test_a_folder_without_images_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    assert main(["classify", str(tmp_path)]) == 0
    assert capsys.readouterr().err == (
        "engine classify: no images found; left out without an image's suffix: 1 (--all tries them)\n"
    )
    assert main(["classify", "--all", str(tmp_path)]) == 1
    assert "decode.unsupported" in capsys.readouterr().out


@pytest.mark.usefixtures("null")
def test_files_that_cannot_be_read_are_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "large.png").touch()
    os.truncate(tmp_path / "large.png", command.MAX_FILE_BYTES + 1)
    assert main(["classify", "--json", str(tmp_path)]) == 1
    errors = {Path(row["path"]).name: row["error"] for row in json_rows(capsys)}
    assert {error["code"] for error in errors.values()} == {"read.failed"}
    assert errors["pipe.png"]["message"] == "not a regular file"
    assert errors["gone.png"]["message"] == "No such file or directory"
    assert "larger than" in errors["large.png"]["message"]


@pytest.mark.usefixtures("null")
def test_a_name_cannot_write_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a\x1b[2J\n\tb.png").write_bytes(png(0))
    main(["classify", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "\x1b" not in lines[1] and lines[1].count("\t") == 4


def test_search_is_sorted_recursive_and_skips_what_is_hidden(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "b/1.webp", "a.png", ".hidden.png", ".git/x.png", "b/.c/y.png", "notes.md", "c/d/e/3.heic"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    search = command.Search([tmp_path, tmp_path / "notes.md"])
    found = [os.path.relpath(name, tmp_path) for name in search]
    assert found == ["a.png", "b/1.webp", "b/2.JPG", "c/d/e/3.heic", "notes.md"]
    assert search.skipped == 1 and search.count() == 5
    every = [os.path.relpath(name, tmp_path) for name in command.Search([tmp_path], every=True)]
    assert every == ["a.png", "notes.md", "b/1.webp", "b/2.JPG", "c/d/e/3.heic"]


def test_an_unreadable_folder_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    (tmp_path / "locked").mkdir()
    (tmp_path / "a.png").touch()
    monkeypatch.setattr(os, "scandir", refuse)
    search = command.Search([tmp_path])
    assert search.count() == 1 and list(search) == [str(tmp_path / "a.png")]
    assert capsys.readouterr().err == f"engine classify: {tmp_path / 'locked'}: Permission denied, skipped\n"


# --- on a terminal --------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_rows_are_columns_and_a_bar_shows_for_many(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    for total, bar in ((3, False), (rows.PROGRESS_FROM_FILES, True)):
        out, err = Terminal(), Terminal()
        monkeypatch.setattr("sys.stdout", out)
        monkeypatch.setattr("sys.stderr", err)
        detector = Detector.from_parts(bundle, NullBackend())
        with rows.printer(False, detector, lambda total=total: total) as show:  # type: ignore[misc]
            for row in detector.classify((f"{i}.png", png(250)) for i in range(total)):
                show(row)
        text = out.getvalue()
        assert text.count("ai_generated") == total and "0.png" in text and "score" in text
        assert ("/50" in text) == bar
        assert err.getvalue() == ""


def test_json_into_a_pipe_has_its_bar_on_the_terminal(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    out, err = io.StringIO(), Terminal()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    detector = Detector.from_parts(bundle, NullBackend())
    with rows.printer(True, detector, lambda: 60) as show:
        for row in detector.classify((f"{i}.png", png(250, (9, 9))) for i in range(60)):
            show(row)
    assert [json.loads(line)["path"] for line in out.getvalue().splitlines()] == [f"{i}.png" for i in range(60)]
    assert "/60" in err.getvalue()


# --- classify itself ------------------------------------------------------------------------------------------------------


def test_images_are_drawn_only_a_little_ahead(bundle: Bundle) -> None:
    """A folder of 100,000 files must not be in memory at once."""
    drawn = most = 0
    data = png(3, (5, 5))

    def endless() -> Iterator[tuple[str, bytes]]:
        nonlocal drawn
        while True:
            drawn += 1
            yield f"{drawn}.png", data

    detector = Detector.from_parts(bundle, NullBackend())
    scores = detector.classify(endless(), batch_size=4, threads=2)
    for given, row in enumerate(scores, 1):
        most = max(most, drawn - given)
        assert row.name == f"{given}.png"
        if given == 400:
            break
    assert most <= 4 + 2 * 2 + 1
    scores.close()  # type: ignore[attr-defined]
    assert (
        not [thread for thread in threading.enumerate() if thread.name.startswith("decode") and thread.is_alive()] or _settles()
    )


def _settles() -> bool:
    for thread in threading.enumerate():
        if thread.name.startswith("decode"):
            thread.join(5)
    return not any(thread.name.startswith("decode") for thread in threading.enumerate())


def test_nothing_but_broken_images_does_not_pile_up_either(bundle: Bundle) -> None:
    drawn = 0

    def endless() -> Iterator[tuple[str, bytes]]:
        nonlocal drawn
        while True:
            drawn += 1
            yield f"{drawn}", b"broken"

    scores = Detector.from_parts(bundle, NullBackend()).classify(endless(), batch_size=4, threads=1)
    assert [next(iter(scores)).name for _ in range(9)] == [str(i) for i in range(1, 10)]
    assert drawn <= 9 + 4 + 2 + 1


def test_batches_reach_across_images(bundle: Bundle) -> None:
    sizes = []

    class Counts(NullBackend):
        def _infer(self, crops: np.ndarray) -> Outputs:
            sizes.append(len(crops))
            return super()._infer(crops)

    detector = Detector.from_parts(bundle, Counts(), crops="five")
    found = list(detector.classify(((str(i), png(i * 20)) for i in range(7)), batch_size=10))
    assert [len(row.score.crops) for row in found if row.score] == [5] * 7
    assert sizes == [10, 10, 10, 5]
    scores = [row.score.score for row in found if row.score]
    assert scores == sorted(scores) and len(set(scores)) == 7


def test_memory_of_the_device_is_met_with_smaller_batches(bundle: Bundle) -> None:
    class Small(NullBackend):
        room = 3

        def _infer(self, crops: np.ndarray) -> Outputs:
            if len(crops) > self.room:
                raise OutOfDeviceMemory("no room")
            return super()._infer(crops)

    images = [(str(i), png(i * 20)) for i in range(11)]
    detector = Detector.from_parts(bundle, Small())
    whole = Detector.from_parts(bundle, NullBackend())
    assert list(detector.classify(images, batch_size=16)) == list(whole.classify(images, batch_size=16))
    Small.room = 0
    with pytest.raises(OutOfDeviceMemory):
        list(detector.classify(images, batch_size=16))


def test_a_broken_output_fails_its_image_alone(bundle: Bundle) -> None:
    class Breaks(NullBackend):
        def _infer(self, crops: np.ndarray) -> Outputs:
            outputs = super()._infer(crops)
            outputs.embedding[crops[:, 0, 0, 0] == 40] = np.nan
            return outputs

    detector = Detector.from_parts(bundle, Breaks())
    found = list(detector.classify((str(i), png(i * 20)) for i in range(4)))
    assert [row.failure.code if row.failure else None for row in found] == [None, None, "engine.failed", None]
    assert found[2].score is None and rows.label(found[2]) == "undetermined" and found[2].width == 300


def test_limits_are_kept(bundle: Bundle) -> None:
    detector = Detector.from_parts(bundle, NullBackend())
    (row,) = detector.classify([("a", png(1))], limits=Limits(max_pixels=300 * 250 - 1, max_frames=1))
    assert row.failure is not None and row.failure.code == "decode.too_many_pixels"


def test_an_animation_is_one_image_of_several_frames(bundle: Bundle) -> None:
    buffer = io.BytesIO()
    frames = [PIL.Image.new("RGB", (300, 300), (v, v, v)) for v in (0, 255, 60)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    detector = Detector.from_parts(bundle, NullBackend(), crops="five")
    (row,) = detector.classify([("a.gif", buffer.getvalue())])
    assert row.frames == 3 and row.score is not None
    assert row.score.frame == 1 and len(row.score.crops) == 5 and row.score.score > 0.99


def test_a_mistake_in_the_reader_is_not_swallowed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: object) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr(classify_module.decoder, "read_crops", wrong)
    with pytest.raises(TypeError, match="a bug"):
        list(Detector.from_parts(bundle, NullBackend()).classify([("a", b"")]))
