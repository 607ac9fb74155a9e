"""What stands between gradio and the network: what it may be asked, how much it may be sent, how much it keeps."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from threading import Thread

import gradio as gr
from gradio import processing_utils
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MEGABYTE = 1024 * 1024
UPLOAD_BYTES = 20 * MEGABYTE
JSON_BYTES = MEGABYTE // 16  # choices and paths; gradio would read a `data:` URL of any size
CACHE_BYTES, CACHE_SECONDS = 256 * MEGABYTE, 3600
# What the page and gradio's clients ask for. Gradio serves more: proxies, recordings for ffmpeg, code to be written.
ASKED = {
    *("app_id", "call", "cancel", "heartbeat", "info", "queue", "run", "startup-events", "theme.css"),
    *("upload", "upload_progress"),
}
NAMED_BY = ("model", "method", "class", "layer", "head", "overlay", "test image")  # of a picture's metadata
GRADIO_SAVES = processing_utils.save_pil_to_cache


class Guard:
    """ASGI middleware: 403 for what the page has no use for, 413 before a large body is in memory."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")).strip("/")
        limit = JSON_BYTES + (UPLOAD_BYTES if path == "gradio_api/upload" else 0)
        too_large = HTTPException(413, f"expected at most {limit:,} bytes, got more")
        got = 0

        async def counted() -> Message:
            """For a body in chunks, whose size no header says."""
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > limit:
                raise too_large
            return message

        async def unsniffed(message: Message) -> None:
            """So that no browser takes an upload for a page because it looks like one."""
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"x-content-type-options", b"nosniff")]
            await send(message)

        if not allowed(path):
            await JSONResponse({"detail": "not a part of this page"}, 403)(scope, receive, send)
        elif int(dict(scope["headers"]).get(b"content-length", 0)) > limit:  # uvicorn takes digits only
            await JSONResponse({"detail": too_large.detail}, 413)(scope, receive, send)
        else:
            await self.app(scope, counted, unsniffed)


def allowed(path: str) -> bool:
    """Whether a path, without slashes around it, is one that the page or gradio's clients ask for."""
    first, _, rest = path.partition("/")
    if first != "gradio_api":
        return first not in ("login", "logout", "monitoring")  # these send on to whatever host the request names
    if rest.startswith("file="):
        return not rest[5:].lower().startswith(("http:", "https:"))  # gradio would fetch it
    return rest.partition("/")[0] in ASKED


def no_downloads() -> None:
    """From now on gradio fetches nothing from an address that a visitor names in place of an upload: whole, of any
    size, from any server but this one."""

    async def refuse(url: str, cache_dir: str) -> str:
        raise gr.Error(f"the upload: expected a file, got the address {url[:100]}", print_exception=False)

    processing_utils.async_ssrf_protected_download = refuse  # gradio has no setting for it


def whole_pictures() -> None:
    """From now on gradio puts a picture into its cache as a whole. It writes the same picture into the same file again,
    for whoever asks for it, and a browser that reads it at that moment would get a part of it and show none. A download
    of it is named by what it shows."""

    def save(image: Image.Image, cache_dir: str, name: str = "image", format: str = "webp") -> str:
        shown = "-".join(str(image.info[key]) for key in NAMED_BY if key in image.info)
        name = re.sub(r"[^\w.-]+", "_", shown).encode()[:100].decode(errors="ignore") or name
        with TemporaryDirectory(dir=cache_dir) as folder:
            written = Path(GRADIO_SAVES(image, folder, name, format))
            target = Path(cache_dir).resolve() / written.parent.name / written.name
            target.parent.mkdir(exist_ok=True)
            return str(written.replace(target))

    processing_utils.save_pil_to_cache = save


@contextmanager
def own_cache() -> Iterator[Path]:
    """While it lasts, gradio keeps uploads and pictures in a folder of this process alone. Build the page within."""
    shared = Path(os.environ.get("GRADIO_TEMP_DIR") or gettempdir()).resolve()
    shared.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="vit-cifar-", dir=shared, ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        yield Path(folder)


def keep_small(folder: Path, page: gr.Blocks) -> None:
    """From now on deletes, every few seconds, what `trim` finds; what the new page itself shows stays."""
    kept = {path for path, _ in files_below(folder)}

    def clean() -> None:
        while True:
            time.sleep(5)
            try:
                gone = trim(folder, kept)
            except OSError as error:  # of one file; the next round tries again
                print(f"the cache cannot be cleaned: {error}")
                continue
            for path in gone:
                for files in page.temp_file_sets:  # gradio would remember their names for ever
                    files.discard(str(path))

    Thread(target=clean, daemon=True).start()


def trim(folder: Path, kept: set[Path], most: int = CACHE_BYTES, oldest: float = CACHE_SECONDS) -> list[Path]:
    """Deletes files below `folder`, the oldest first, that are older than `oldest` seconds or that make it more than
    `most` bytes in all, but none of `kept`; returns them."""
    gone, files = [], files_below(folder)
    total = sum(stat.st_size for _, stat in files)
    for path, stat in sorted(files, key=lambda file: file[1].st_mtime):
        if path not in kept and (total > most or time.time() - stat.st_mtime > oldest):
            path.unlink(missing_ok=True)
            with suppress(OSError):  # it holds another file
                path.parent.rmdir()
            total -= stat.st_size
            gone.append(path)
    return gone


def files_below(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """Without those that go meanwhile."""
    found = []
    for path in (Path(parent, name) for parent, _, names in os.walk(folder) for name in names):
        with suppress(FileNotFoundError):
            found.append((path, path.stat()))
    return found
