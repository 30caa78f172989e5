"""COCO downloaded from a server of this machine: interrupted, damaged, malicious."""

import hashlib
import io
import json
import stat
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from mamba_vision.data import coco_2017, download
from mamba_vision.data.coco_2017 import Archive
from mamba_vision.errors import UserError


def zipped(files):
    """The bytes of a zip file; a file's content may come with the mode of a link."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            if isinstance(content, tuple):
                content, mode = content
                info.external_attr = mode << 16
            archive.writestr(info, content)
    return buffer.getvalue()


def annotations(split, count):
    images = [
        {"id": i, "file_name": f"{i:012d}.jpg", "height": 1, "width": 1} for i in range(count)
    ]
    return json.dumps({"images": images, "annotations": [], "categories": []})


FILES = {
    "annotations": zipped(
        {
            "annotations/instances_train2017.json": annotations("train2017", 3),
            "annotations/instances_val2017.json": annotations("val2017", 2),
            "annotations/captions_val2017.json": "{}",
        }
    ),
    "val2017": zipped({"val2017/": ""} | {f"val2017/{i:012d}.jpg": b"v" * 5000 for i in range(2)}),
    "train2017": zipped({f"train2017/{i:012d}.jpg": b"t" * 70_000 for i in range(3)}),
}


@pytest.fixture
def server(monkeypatch):
    """Serves FILES; ``log`` holds the ranges asked for, ``cut`` how many bytes an answer may have.

    ``ranges`` turned off makes it a server that always sends the whole.
    """
    state = SimpleNamespace(files=dict(FILES), log=[], cut=[], ranges=True, code=None)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            data = next(
                state.files[part]
                for part, archive in coco_2017.ARCHIVES.items()
                if self.path == f"/{archive.path}"
            )
            asked = self.headers.get("Range")
            state.log.append(asked)
            if state.code:
                return self.send_error(state.code)
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and state.ranges else 0
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            end = start + state.cut.pop(0) if state.cut else len(data)
            self.wfile.write(data[start:end])
            return None

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    state.url = f"http://127.0.0.1:{httpd.server_port}"
    monkeypatch.setattr(download, "PAUSE", 0)
    monkeypatch.setattr(coco_2017, "ARCHIVES", archives(FILES))
    yield state
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def archives(files):
    return {
        part: Archive(
            known.path, len(files[part]), hashlib.md5(files[part]).hexdigest(), known.members
        )
        for part, known in coco_2017.ARCHIVES.items()
    }


@pytest.fixture
def run(tool, server, tmp_path, monkeypatch):
    main = tool("prepare_coco")
    monkeypatch.setitem(main.__globals__, "ARCHIVES", coco_2017.ARCHIVES)
    start = ["--datasets", tmp_path / "datasets", "--server", server.url]
    return lambda *arguments: main([str(a) for a in (*start, *arguments)])


def tree(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


WHOLE = [
    "annotations/instances_train2017.json",
    "annotations/instances_val2017.json",
    *(f"train2017/{i:012d}.jpg" for i in range(3)),
    *(f"val2017/{i:012d}.jpg" for i in range(2)),
]


def test_downloads_checks_and_unpacks(run, server, tmp_path, capsys):
    assert run("--check") == 1
    assert not (tmp_path / "datasets").exists()
    assert "instances_train2017.json" in capsys.readouterr().out
    assert run() == 0
    coco = tmp_path / "datasets" / "coco"
    assert tree(coco) == WHOLE
    assert (coco / "val2017" / "000000000001.jpg").read_bytes() == b"v" * 5000
    caught = capsys.readouterr()
    assert caught.out.splitlines()[-3:] == [f"{part}: complete" for part in FILES]
    assert "train2017.zip: 100%" in caught.err
    assert len(server.log) == 3

    assert run() == 0  # nothing is done twice
    assert run("--check") == 0
    assert len(server.log) == 3
    (coco / "val2017" / "000000000001.jpg").unlink()
    assert run("--check") == 1
    assert "1 image is missing" in capsys.readouterr().out
    assert run("--parts", "val2017") == 0
    assert len(server.log) == 4
    assert tree(coco) == WHOLE


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_connection_is_taken_up_again(run, server, tmp_path, ranges):
    server.ranges = ranges
    assert run("--parts", "annotations") == 0
    size = len(FILES["train2017"])
    server.log.clear()
    server.cut = [100_000, 50_000, 0, size]
    assert run("--parts", "train2017") == 0
    gone_on = ["bytes=100000-", "bytes=150000-", "bytes=150000-"]
    anew = ["bytes=100000-", "bytes=50000-", None]  # what came before is written over
    assert server.log == [None, *(gone_on if ranges else anew)]
    assert (tmp_path / "datasets/coco/train2017/000000000002.jpg").read_bytes() == b"t" * 70_000


def test_an_interrupted_download_is_gone_on_with(run, server, tmp_path, capsys):
    assert run("--parts", "annotations") == 0
    server.log.clear()
    server.cut = [120_000] + [0] * 10
    assert run("--parts", "train2017") == 2
    size = len(FILES["train2017"])
    assert f"120000 of {size} bytes are kept: run this again" in capsys.readouterr().err
    assert (tmp_path / "datasets/coco/train2017.zip.partial").stat().st_size == 120_000
    assert not (tmp_path / "datasets/coco/train2017").exists()
    server.cut, server.log = [], []
    assert run("--parts", "train2017") == 0
    assert server.log == ["bytes=120000-"]
    assert tree(tmp_path / "datasets" / "coco") == [p for p in WHOLE if not p.startswith("val")]


def test_a_file_of_another_md5_is_refused(run, server, tmp_path, capsys):
    data = bytearray(FILES["annotations"])
    data[40] ^= 1
    server.files["annotations"] = bytes(data)
    assert run() == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert hashlib.md5(data).hexdigest() in error
    assert coco_2017.ARCHIVES["annotations"].md5 in error
    assert tree(tmp_path / "datasets" / "coco") == []  # the wrong file is gone
    server.files["annotations"] += b"?"
    assert run() == 2
    assert "bytes instead of" in capsys.readouterr().err


def test_what_the_server_does_not_have(run, server, capsys):
    server.code = 404
    assert run() == 2
    assert "HTTP Error 404" in capsys.readouterr().err
    assert len(server.log) == 1
    server.code = 503  # may pass: tried again
    assert run() == 2
    assert len(server.log) == 1 + download.ATTEMPTS


def test_zip_files_that_are_there_are_taken(run, server, tmp_path, capsys):
    zips = tmp_path / "zips"
    zips.mkdir()
    for part, archive in coco_2017.ARCHIVES.items():
        (zips / archive.name).write_bytes(FILES[part])
    (zips / "val2017.zip").write_bytes(FILES["val2017"][:-1])
    assert run("--zips", zips) == 2
    assert f"{zips / 'val2017.zip'}: the file has" in capsys.readouterr().err
    (zips / "val2017.zip").write_bytes(FILES["val2017"])
    assert run("--zips", zips) == 0
    assert server.log == []
    assert tree(tmp_path / "datasets" / "coco") == WHOLE
    assert len(tree(zips)) == 3  # the user's own are kept
    assert run("--zips", tmp_path / "none") == 2


def test_images_without_their_annotations(run, server, tmp_path, capsys):
    assert run("--parts", "val2017") == 2
    assert "prepare the part annotations first" in capsys.readouterr().err
    assert server.log == []
    (tmp_path / "datasets").write_text("a file")
    assert run() == 2
    assert "cannot be made" in capsys.readouterr().err


def test_a_full_disk(run, server, tmp_path, monkeypatch, capsys):
    usage = SimpleNamespace(free=10)
    monkeypatch.setattr(coco_2017.shutil, "disk_usage", lambda _: usage)
    assert run() == 2
    assert "0.0 GB are free" in capsys.readouterr().err
    assert server.log == []


@pytest.mark.parametrize(
    "bad",
    [
        {"../val2017/1.jpg": b""},
        {"/val2017/1.jpg": b""},
        {"val2017/../../1.jpg": b""},
        {"val2017\\..\\1.jpg": b""},
        {"c:1.jpg": b""},
        {"val2017/1.jpg": (b"/etc", stat.S_IFLNK | 0o777)},
    ],
)
def test_a_zip_file_that_leads_out_is_not_unpacked(tmp_path, bad):
    (tmp_path / "a.zip").write_bytes(zipped({"val2017/0.jpg": b"good"} | bad))
    with pytest.raises(UserError, match="leads out of the folder"):
        coco_2017.unpack(tmp_path / "a.zip", tmp_path / "to", ".*")
    assert tree(tmp_path) == ["a.zip"]


def test_damaged_zip_files(tmp_path):
    path, to = tmp_path / "a.zip", tmp_path / "to"
    to.mkdir()
    whole = zipped({f"val2017/{i}.jpg": b"good" * 9 for i in range(3)})
    at = whole.index(b"good", whole.index(b"val2017/1.jpg"))
    for content in (b"", b"<html>", whole[:-30], whole[:at] + b"BAD!" + whole[at + 4 :]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.zip: is no zip file, or damaged"):
            coco_2017.unpack(path, to, ".*jpg")
    assert [p for p in tree(to) if not p.endswith(".partial")] == ["val2017/0.jpg"]
    path.write_bytes(whole)
    assert coco_2017.unpack(path, to, ".*jpg") == 2  # the first is there
    assert tree(to) == [f"val2017/{i}.jpg" for i in range(3)]


def test_the_published_archives():
    """What can be known without a download: the layout, and the form of the numbers."""
    for part, archive in coco_2017.ARCHIVES.items():
        assert archive.name == f"{part.replace('annotations', 'annotations_trainval2017')}.zip"
        assert len(bytes.fromhex(archive.md5)) == 16
