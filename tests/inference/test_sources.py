"""Inputs of the command: what is found, in which order, under which name it is drawn."""

from __future__ import annotations

import http.server
import io
import os
import sys
import threading
from types import SimpleNamespace

import pytest

from sparse_rcnn.data.decode import ImageError, decode_image
from sparse_rcnn.runtime import read_image
from sparse_rcnn.sources import Inputs, expand_inputs, fetch_url, image_ids, output_names

SUFFIXES = (".jpg", ".png")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in ("a/2.jpg", "a/1.PNG", "a/.hidden.jpg", "a/notes.txt", "a/deep/er/3.jpg", "b/1.PNG", "b/[x].png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _sources(*arguments, recursive=False):
    return expand_inputs(arguments, recursive).sources


def test_directory(tree):
    assert _sources("a") == ["a/1.PNG", "a/2.jpg"]
    assert _sources("a", recursive=True) == ["a/1.PNG", "a/2.jpg", "a/deep/er/3.jpg"]
    assert expand_inputs(["a"], recursive=True).relative == ["1.PNG", "2.jpg", "deep/er/3.jpg"]


def test_a_named_file_may_be_called_anything(tree):
    assert _sources("a/notes.txt", "b/[x].png") == ["a/notes.txt", "b/[x].png"]


def test_globs(tree):
    assert _sources("?/*.PNG") == ["a/1.PNG", "b/1.PNG"]
    assert _sources("**/*.jpg") == ["a/2.jpg", "a/deep/er/3.jpg"]
    assert _sources("[ab]") == ["a/1.PNG", "a/2.jpg", "b/1.PNG", "b/[x].png"]  # as the shell's own a b


def test_each_input_once(tree):
    assert _sources("a/2.jpg", "a", "./a/2.jpg", str(tree / "a" / "1.PNG")) == ["a/2.jpg", "a/1.PNG"]


def test_stdin(tree, monkeypatch):
    lines = io.BytesIO(b"a/2.jpg\r\n\n  b/1.PNG  \nnowhere.jpg\nhttp://host/x.jpg")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=lines))
    inputs = expand_inputs(["-", "a/1.PNG"])
    assert inputs.sources == ["a/2.jpg", "b/1.PNG", "http://host/x.jpg", "a/1.PNG"]
    assert inputs.problems == ["nowhere.jpg: no such file or directory"]


def test_problems(tree):
    inputs = expand_inputs(["empty", "no/*.jpg", "gone.jpg", "nul\0.jpg", "a/2.jpg"])
    assert inputs.sources == ["a/2.jpg"]
    assert inputs.problems[:3] == [
        "empty: no images in this directory (--recursive looks deeper)",
        "no/*.jpg: the pattern matches nothing",
        "gone.jpg: no such file or directory",
    ]
    assert len(inputs.problems) == 4


def test_what_cannot_be_read_in_a_directory_is_kept_to_be_named(tree):
    os.mkfifo(tree / "a" / "0.jpg")
    os.symlink("nowhere.jpg", tree / "a" / "3.jpg")
    assert _sources("a") == ["a/0.jpg", "a/1.PNG", "a/2.jpg", "a/3.jpg"]
    for name, reason in (("0.jpg", "not a regular file"), ("3.jpg", "no such file")):
        with pytest.raises(ImageError, match=reason):
            decode_image(tree / "a" / name)


def test_output_names_keep_the_structure(tree):
    assert output_names(expand_inputs(["a"], recursive=True), (".jpg", ".png")) == ["1.PNG", "2.jpg", "deep/er/3.jpg"]
    assert output_names(expand_inputs(["a/notes.txt"]), SUFFIXES) == ["notes.txt.png"]


def test_output_names_of_equal_files_in_two_directories(tree):
    assert output_names(expand_inputs(["a", "b"]), SUFFIXES) == ["a/1.PNG", "a/2.jpg", "b/1.PNG", "b/[x].png"]


def test_output_names_are_never_equal():
    sources = [
        "http://h/x.jpg?1",
        "http://h/x.jpg?2",
        "http://h:80/x.jpg",
        "/d/y.gif",
        "/d/y.gif.png",
        "/d/y.stages.png",
    ]
    relative = ["x.jpg", "x.jpg", "x.jpg", "y.gif", "y.gif.png", "y.stages.png"]
    assert output_names(Inputs(sources, relative), SUFFIXES) == [
        *("h/x.jpg", "h/x-2.jpg", "h_80/x.jpg", "y.gif.png", "y.gif-2.png", "y.stages.png"),
    ]
    # The strip of y.png is y.stages.png.
    assert output_names(Inputs(["y.png", "y.stages.png"], ["y.png", "y.stages.png"]), SUFFIXES) == [
        *("y.png", "y.stages-2.png"),
    ]


def test_image_ids():
    assert image_ids(["val/000000000139.jpg", "val/000000000285.jpg", "http://h/7.png?x=1"]) == [139, 285, 7]
    assert image_ids(["a/1.jpg", "b/1.jpg"]) == [0, 1]
    assert image_ids(["5.jpg", "x.jpg"]) == [0, 1]


@pytest.fixture
def server(monkeypatch, tmp_path, write_image):
    content = write_image(tmp_path / "served.png", 12, 34).read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = content if self.path == "/x.png" else b"<html>"
            self.send_response(404 if self.path == "/gone.png" else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_url(server):
    assert read_image(f"{server}/x.png").shape == (12, 34, 3)
    with pytest.raises(ImageError, match=f"{server}/gone.png: the server answered 404"):
        fetch_url(f"{server}/gone.png")
    with pytest.raises(ImageError, match="larger than the limit of 5 bytes"):
        fetch_url(f"{server}/x.png", max_bytes=5)
    with pytest.raises(ImageError, match=f"{server}/page.html: "):
        read_image(f"{server}/page.html")


def test_url_without_a_server(server):
    with pytest.raises(ImageError, match="http://127.0.0.1:1/x.png: cannot be fetched: "):
        fetch_url("http://127.0.0.1:1/x.png", timeout=2)
    with pytest.raises(ImageError, match="cannot be fetched"):
        fetch_url("http://")
