import asyncio
import os
import time
from pathlib import Path

import gradio as gr
import pytest
import safehttpx
from gradio import processing_utils
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from vit_cifar.demo.guard import (
    GRADIO_SAVES,
    JSON_BYTES,
    UPLOAD_BYTES,
    Guard,
    allowed,
    no_downloads,
    own_cache,
    trim,
    whole_pictures,
)


@pytest.fixture(scope="module")
def client():
    async def count(request: Request) -> PlainTextResponse:
        return PlainTextResponse(str(len(await request.body())))

    app = Starlette(routes=[Route("/{path:path}", count, methods=["GET", "POST"])], middleware=[Middleware(Guard)])
    return TestClient(app)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    ("path", "limit"), [("/gradio_api/queue/join", JSON_BYTES), ("/gradio_api/upload", UPLOAD_BYTES + JSON_BYTES)]
)
def test_a_body_over_the_limit_is_refused(client, path, limit, chunked):
    for size in (limit, limit + 1):
        body = bytes(size)
        half = size // 2
        answer = client.post(path, content=iter([body[:half], body[half:]]) if chunked else body)
        if size == limit:
            assert (answer.status_code, answer.text) == (200, str(size))
        else:
            assert answer.status_code == 413 and f"expected at most {limit:,} bytes" in answer.text


def test_who_reads_a_picture_while_it_is_saved_again_gets_all_of_it(monkeypatch, tmp_path):
    monkeypatch.setattr(processing_utils, "save_pil_to_cache", GRADIO_SAVES)
    picture = gr.Image(format="png")
    picture.GRADIO_CACHE = str(tmp_path)

    def files_left_after_saving_again() -> int:
        path = picture.postprocess(Image.new("RGB", (8, 8), "red")).path
        with open(path, "rb") as reader:
            assert picture.postprocess(Image.new("RGB", (8, 8), "red")).path == path
            return os.fstat(reader.fileno()).st_nlink

    assert files_left_after_saving_again() == 1  # gradio as it is: what is read is written over
    whole_pictures()
    assert files_left_after_saving_again() == 0  # another file took its place
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["image.png"]


def test_an_address_in_place_of_an_upload_is_not_fetched(monkeypatch):
    fetched = []

    async def fetch(url, *_, **__):
        fetched.append(url)
        raise ConnectionError

    monkeypatch.setattr(safehttpx, "get", fetch)
    monkeypatch.setattr(
        processing_utils, "async_ssrf_protected_download", processing_utils.async_ssrf_protected_download
    )
    picture = {"path": "https://example.com/x.png", "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(ConnectionError):
        asyncio.run(processing_utils.async_move_files_to_cache(picture, gr.Image()))
    assert fetched == ["https://example.com/x.png"]  # gradio as it is
    no_downloads()
    with pytest.raises(gr.Error, match="got the address https://example.com/x.png"):
        asyncio.run(processing_utils.async_move_files_to_cache(picture, gr.Image()))
    assert len(fetched) == 1


def test_a_large_body_is_not_read_to_its_end():
    pieces = []

    async def receive():
        pieces.append(bytes(JSON_BYTES // 2))
        return {"type": "http.request", "body": pieces[-1], "more_body": len(pieces) < 100}

    async def reads_all(scope, receive, send):
        while (await receive())["more_body"]:
            pass

    scope = {"type": "http", "path": "/gradio_api/run/predict", "headers": []}
    with pytest.raises(HTTPException, match=f"413: expected at most {JSON_BYTES:,} bytes"):
        asyncio.run(Guard(reads_all)(scope, receive, send=None))
    assert len(pieces) == 3


def test_no_answer_is_to_be_taken_for_another_kind_of_file(client):
    assert client.get("/gradio_api/info").headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["", "model-2", "config", "assets/x.js", "gradio_api/queue/join", "gradio_api/info"])
def test_what_the_page_asks_for_is_let_through(client, path):
    assert allowed(path) and client.get(f"/{path}").status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        *("gradio_api/proxy=http://127.0.0.1/", "gradio_api/file=http://127.0.0.1/x", "gradio_api/file=HTTPS://x"),
        *("gradio_api/file/http://127.0.0.1/", "gradio_api/vibe-edit", "gradio_api/process_recording", "gradio_api"),
        *("gradio_api/component_server", "login", "login/", "logout", "monitoring/summary", "gradio_api/runs"),
    ],
)
def test_what_it_has_no_use_for_is_refused(client, path):
    assert client.post(f"/{path}").status_code == client.get(f"/{path}").status_code == 403


def test_files_of_the_page_are_let_through():
    assert allowed("gradio_api/file=/tmp/gradio/a/dog.png") and allowed("gradio_api/file=C:/a/http.png")


def write(path: Path, size: int, seconds_ago: float) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (time.time() - seconds_ago,) * 2)
    return path


def test_the_oldest_files_go_first(tmp_path):
    first, *others = [write(tmp_path / str(n) / "x.png", 100, seconds_ago=50 - n) for n in range(5)]
    half = write(tmp_path / "upload", 100, seconds_ago=1)  # one that is under way
    assert trim(tmp_path, {first}, most=600) == []
    assert trim(tmp_path, {first}, most=350) == others[:3]
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted([first, others[3], half])
    assert not others[0].parent.exists()
    assert trim(tmp_path, {first}, most=600, oldest=20) == [others[3]]  # however few there are
    assert first.exists() and half.exists()


def test_a_cache_of_its_own_is_gone_afterwards(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    another = write(tmp_path / "another program's.png", 100, seconds_ago=1e6)
    with own_cache() as folder:
        assert os.environ["GRADIO_TEMP_DIR"] == str(folder) and folder.parent == tmp_path
        write(folder / "1" / "x.png", 100, seconds_ago=1e6)
    assert list(tmp_path.iterdir()) == [another]
