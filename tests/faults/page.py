"""The page under bad pictures, under load, and before a stranger: each function starts `app.py` and asks it over HTTP.

Each returns its figures, and raises AssertionError where an answer is wrong or memory grows; times are figures only.
"""

import json
import statistics
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, sleep
from uuid import uuid4

import httpx
import psutil

from tests.faults.images import hand_made, mutations
from tests.helpers import PATIENCE, ROOT, served
from vit_cifar.demo.guard import CACHE_BYTES, JSON_BYTES, MEGABYTE, UPLOAD_BYTES, files_below
from vit_cifar.demo.page import EXAMPLES

GROWTH = 200 * MEGABYTE
BUSY = "Queue is full"
GOOD = {path.name: path.read_bytes() for path in sorted(EXAMPLES.glob("*.png"))}
DOG = GOOD["dog.png"]


class Visitor:
    """One session with the page, over plain HTTP."""

    def __init__(self, url: str):
        self.http = httpx.Client(base_url=url, timeout=PATIENCE)
        self.session = uuid4().hex

    def ask(self, picture: bytes, name: str = "picture.png") -> list | str:
        """What `predict` answers to a picture, its outputs or the line of its error."""
        upload = self.http.post("/gradio_api/upload", files={"files": (name, picture)})
        assert upload.status_code == 200, upload.text
        return self.call("predict", {"path": upload.json()[0]}, "", 1, "mean")

    def call(self, name: str, *data: object) -> list | str | None:
        """The same of any endpoint; None for an error whose line is only in the page's log."""
        body = {"data": data, "session_hash": self.session}
        joined = self.http.post(f"/gradio_api/call/{name}", json=body)
        if joined.status_code != 200:
            return joined.json()["detail"]
        stream = self.http.get(f"/gradio_api/call/{name}/{joined.json()['event_id']}").text
        event, data = stream.strip().split("\n\n")[-1].split("\n")  # those before it are heartbeats
        answer = json.loads(data.removeprefix("data: "))
        return answer if event == "event: complete" else answer["error"]


class Demo:
    """The running page."""

    def __init__(self, process: psutil.Process, url: str, cache: Path):
        self.process, self.url, self.cache, self.most = process, url, cache, 0
        visitor = Visitor(url)
        for picture in GOOD.values():  # what is set up once, by the first requests
            visitor.ask(picture)
        self.dog, self.start = visitor.ask(DOG), self.memory()

    def memory(self) -> int:
        return self.process.memory_info().rss

    def watch(self) -> None:
        while self.process.is_running():
            self.most = max(self.most, self.memory())
            sleep(0.02)

    def cached(self) -> int:
        """Bytes of all files that the page keeps."""
        return sum(stat.st_size for _, stat in files_below(self.cache))

    def still_answers(self) -> None:
        assert Visitor(self.url).ask(DOG) == self.dog

    def nothing_crashed(self) -> None:
        log = self.cache.with_name("page.log").read_text()
        assert "Traceback" not in log, log

    def grown(self) -> dict[str, float]:
        """Megabytes since the start, at most and at the end."""
        most, end = self.most - self.start, self.memory() - self.start
        assert end < GROWTH and most < GROWTH, f"memory grew by {most:,} bytes at most and {end:,} at the end"
        return {"megabytes_grown_at_most": most / MEGABYTE, "megabytes_grown_at_the_end": end / MEGABYTE}


@contextmanager
def demo() -> Iterator[Demo]:
    with TemporaryDirectory() as folder:
        cache = Path(folder, "cache")
        cache.mkdir()
        with served(Path(folder), sys.executable, ROOT / "app.py", GRADIO_TEMP_DIR=str(cache)) as (process, url):
            page = Demo(psutil.Process(process.pid), url, cache)
            threading.Thread(target=page.watch, daemon=True).start()
            yield page
            assert process.poll() is None


def at_once(count: int, task: Callable[[int], object]) -> list:
    """What `count` threads return that start together; each is given its number."""
    barrier = threading.Barrier(count)

    def run(number: int) -> object:
        barrier.wait()
        return task(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def readable(line: str) -> bool:
    return line.startswith("the upload: expected ") and ", got " in line and "\n" not in line


def http(mutated: int = 500) -> dict:
    """Pictures that are none, bodies over the limit, and eight bombs at once."""
    files = hand_made()
    bombs = {name: data for name, data in files.items() if "bomb" in name}
    with demo() as page:
        visitor, refused = Visitor(page.url), 0
        for name, data in files.items():
            answer = visitor.ask(data, name)
            assert isinstance(answer, list) or readable(answer), f"{name}: {answer}"
            refused += isinstance(answer, str)
            page.still_answers()
        for number, data in enumerate(mutations(mutated)):
            answer = visitor.ask(data)
            assert isinstance(answer, list) or readable(answer), f"mutation {number}: {answer}"
            refused += isinstance(answer, str)
        page.still_answers()

        too_much = bytes(UPLOAD_BYTES + MEGABYTE)
        data_url = "data:image/png;base64," + "A" * 6 * MEGABYTE
        body = json.dumps({"data": [{"url": data_url}, "", 1, "mean"]}).encode()
        pieces = (b"--x\r\nContent-Disposition: form-data; name=files; filename=x.png\r\n\r\n", too_much)
        form = {"Content-Type": "multipart/form-data; boundary=x"}
        for answer in (
            visitor.http.post("/gradio_api/upload", files={"files": ("large.png", too_much)}),
            visitor.http.post("/gradio_api/upload", content=iter(pieces), headers=form),
            visitor.http.post("/gradio_api/call/predict", content=body),
            visitor.http.post("/gradio_api/call/predict", content=iter([body])),
            visitor.http.post("/gradio_api/queue/join", content=iter([body])),
            visitor.http.post("/gradio_api/run/predict", content=body),
        ):
            assert answer.status_code == 413 and "at most" in answer.text, answer.text
        assert readable(visitor.call("predict", {"url": data_url[: JSON_BYTES // 2]}, "", 1, "mean"))
        page.still_answers()

        assert bombs
        answers = at_once(8, lambda number: Visitor(page.url).ask(list(bombs.values())[number % len(bombs)], "x.png"))
        assert all(isinstance(answer, str) and readable(answer) for answer in answers), answers
        page.still_answers()
        page.nothing_crashed()
        return {"hand_made": len(files), "mutations": mutated, "refused": refused} | page.grown()


def load(users: int = 20, each: int = 20, crowd: int = 64, in_a_row: int = 1000, uploads: int = 30) -> dict:
    """Many at once, more than the queue holds, one after the other, and more bytes than the page keeps."""
    with demo() as page:
        quiet = statistics.median(_seconds(Visitor(page.url), page) for _ in range(20))
        visitors = [Visitor(page.url) for _ in range(max(users, crowd))]
        rounds = at_once(users, lambda number: [_seconds(visitors[number], page) for _ in range(each)])
        seconds = [second for one in rounds for second in one]

        answers = at_once(crowd, lambda number: visitors[number].ask(DOG))
        busy = [answer for answer in answers if isinstance(answer, str)]
        assert all(answer == page.dog or answer.startswith(BUSY) for answer in answers), answers
        assert len(busy) < crowd
        end = monotonic()
        while _seconds(visitors[0], page) > 2 * quiet and monotonic() < end + PATIENCE:
            pass
        normal_again = monotonic() - end

        memory = []
        for _ in range(10):
            for _ in range(in_a_row // 10):
                visitors[0].ask(DOG)
            memory.append(page.memory())
        slope = (memory[-1] - memory[4]) / (in_a_row / 2)  # of the second half, when all has been set up
        assert slope * 1000 < 20 * MEGABYTE, memory

        filling = (bytes([number]) * (UPLOAD_BYTES - MEGABYTE) for number in range(uploads))
        for data in filling:
            visitors[0].http.post("/gradio_api/upload", files={"files": ("large.png", data)}).raise_for_status()
        filled, deadline = page.cached(), monotonic() + PATIENCE
        while page.cached() > CACHE_BYTES and monotonic() < deadline:
            sleep(0.1)
        assert page.cached() <= CACHE_BYTES
        page.still_answers()
        page.nothing_crashed()
        assert all(visitors[0].http.get(f"/gradio_api/file={file}").status_code == 200 for file in _shown(page.url))
        return {
            "median_seconds_alone": quiet,
            "users": users,
            "requests_each": each,
            "p95_seconds": statistics.quantiles(seconds, n=20)[-1],
            "crowd": crowd,
            "busy": len(busy),
            "normal_again_after_seconds": normal_again,
            "in_a_row": in_a_row,
            "bytes_grown_a_request": slope,
            "cache_megabytes_uploaded": filled / MEGABYTE,
            "cache_megabytes_kept": page.cached() / MEGABYTE,
        } | page.grown()


def _seconds(visitor: Visitor, page: Demo) -> float:
    start = monotonic()
    answer = visitor.ask(DOG)
    seconds = monotonic() - start
    assert answer == page.dog
    return seconds


def _shown(url: str) -> list[str]:
    """The pictures that a new visitor's page shows, as paths."""
    found, waiting = [], [httpx.get(f"{url}/config", timeout=PATIENCE).json()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict) and (value.get("meta") or {}).get("_type") == "gradio.FileData":
            found.append(value["path"])
        elif isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
    return [path for path in found if not path.startswith("http")]  # of gradio's own examples of an API call


def users(count: int = 8, rounds: int = 5) -> dict:
    """Several at once, each with a picture of his own: what each gets is what he gets when alone."""
    names = list(GOOD)[:count]

    def ask(visitor: Visitor, number: int) -> list:
        # Files are named after what they hold: where the names are the same, so are the pictures.
        answer = [visitor.ask(GOOD[names[number]], names[number]), visitor.call("redraw", "cat", 1, "max")]
        return [*answer, visitor.call("hide", [number, number + 1]), visitor.call("occlusion", "cat")]

    with demo() as page:
        alone = [ask(Visitor(page.url), number) for number in range(count)]
        assert len({json.dumps(answer) for answer in alone}) == count
        assert all(isinstance(part, list) for answer in alone for part in answer)
        visitors, alike = [Visitor(page.url) for _ in names], 0
        for _ in range(rounds):
            answers = at_once(count, lambda number: ask(visitors[number], number))
            assert answers == alone
            alike += sum(map(len, answers))
        page.nothing_crashed()
        return {"users": count, "rounds": rounds, "requests": alike}


@contextmanager
def canary() -> Iterator[tuple[str, list[str]]]:
    """A server on this machine that nobody may ask: its address, and what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(DOG)

        do_HEAD = do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def network() -> dict:
    """Files outside, addresses inside, files that a browser would run, redirects, gradio's other doors."""
    with demo() as page, canary() as (inside, asked):
        visitor = Visitor(page.url)
        secret = page.cache.parent / "secret.png"
        secret.write_bytes(DOG + b"the secret")
        outside = ["/etc/passwd", str(secret), "../" * 12 + "etc/passwd", "..%2f" * 12 + "etc%2fpasswd"]
        elsewhere = [f"{inside}/dog.png", "http://169.254.169.254/latest/meta-data/", "http://[::1]/x", "//127.0.0.1/x"]
        elsewhere += ["https://example.com/x.png", "file:///etc/passwd", "ftp://127.0.0.1/x", "hTTp://127.0.0.1/x"]

        for address in [*outside, *elsewhere]:
            for picture in ({"path": address}, {"path": address, "meta": {"_type": "gradio.FileData"}}):
                answer = visitor.call("predict", picture | {"url": address}, "", 1, "mean")
                assert answer is None or readable(answer), answer  # None: gradio itself says no, with no reason
                if address.startswith("http") and "meta" in picture:  # gradio would fetch it before any check of ours
                    assert "got the address" in answer, answer

        pages = [f"/gradio_api/{door}{address}" for door in DOORS for address in [*outside, *elsewhere]]
        pages += [f"/{folder}/{'..%2f' * 12}etc/passwd" for folder in ("static", "assets", "svelte", "gradio_api")]
        pages += ["/monitoring", "/monitoring/", "/monitoring/summary", "/monitoring/x", "/login", "/logout"]
        pages += [f"/gradio_api/{name}" for name in ("runs", "openapi.json", "vibe-code", "reset", "dev/reload")]
        answers = [_raw(page.url, "GET", path) for path in pages]
        posts = ("/login", "/gradio_api/vibe-edit", "/gradio_api/process_recording", "/gradio_api/component_server")
        answers += [_raw(page.url, "POST", path) for path in posts]
        for path, answer in zip([*pages, *posts], answers, strict=True):
            assert 400 <= answer.status_code < 500, f"{path}: {answer.status_code}"
            assert b"root:" not in answer.content and b"the secret" not in answer.content, path
        redirects = ["//example.com", "/%2f%2fexample.com", "//example.com/%2e%2e", "/\\example.com", "/?next=//e.com"]
        for path in redirects:
            answer = _raw(page.url, "GET", path)
            assert "location" not in answer.headers, f"{path}: {answer.headers}"

        script = b"<script>alert(1)</script>"
        drawing = b'<svg xmlns="http://www.w3.org/2000/svg">' + script + b"</svg>"
        for name, data in {
            "page.html": script,
            "drawing.svg": drawing,
            "picture.png": script,
            "../../x.js": b"1",
        }.items():
            upload = visitor.http.post("/gradio_api/upload", files={"files": (name, data)}).raise_for_status()
            path = upload.json()[0]
            assert Path(path).resolve().is_relative_to(page.cache.resolve()), path
            back = visitor.http.get(f"/gradio_api/file={path}")
            kind = back.headers["content-type"], back.headers["content-disposition"].partition(";")[0]
            assert kind in (("application/octet-stream", "attachment"), ("image/png", "inline")), kind
            assert back.headers["x-content-type-options"] == "nosniff"
            assert readable(visitor.ask(data, name))
        assert not asked, f"the page asked for {asked}"
        page.still_answers()
        return {"addresses": len(outside) + len(elsewhere), "pages": len(answers) + len(redirects)}


DOORS = ("file=", "file/", "proxy=", "stream/", "custom_component/")


def _raw(url: str, method: str, path: str) -> httpx.Response:
    """An address as it is: httpx would tidy it up. `Host` says where a careless redirect would go."""
    address = httpx.URL(url).copy_with(raw_path=path.encode())
    request = httpx.Request(method, address, headers={"X-Forwarded-Host": "example.com"})
    with httpx.Client(timeout=PATIENCE) as client:
        return client.send(request)
