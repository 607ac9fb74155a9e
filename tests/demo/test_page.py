import json
import os
import re
import socket
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from time import monotonic, sleep

import httpx
import numpy as np
import psutil
import pyarrow.parquet
import pytest
import torch
from gradio.route_utils import delete_files_created_by_app
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from helpers import ROOT, run, skip_or_fail
from PIL import Image, ImageOps
from playwright.sync_api import Browser, Request, expect, sync_playwright

from vit_cifar import CIFAR10_CLASSES
from vit_cifar.demo.look import open_upload
from vit_cifar.demo.page import EXAMPLES, LAUNCH_OPTIONS, build_page
from vit_cifar.explain.attention import cls_map
from vit_cifar.explain.overlay import classic_overlay, colour_overlay
from vit_cifar.images import ImageError, open_image
from vit_cifar.models import load_model

CHROMIUM = Path("/usr/bin/chromium")
PATIENCE = 120  # seconds; a test machine may be busy
LAYERS, HEADS = 2, 4


@pytest.fixture(scope="module")
def loaded(tiny_model_folder):
    """Random weights, made decisive: different pictures get different answers."""
    model, processor = load_model(str(tiny_model_folder))
    with torch.no_grad():
        model.classifier.weight.mul_(40)
        for layer in model.vit.layers:
            layer.attention.q_proj.weight.mul_(10)
            layer.attention.k_proj.weight.mul_(10)
    return model, processor


@pytest.fixture(scope="module")
def page(loaded):
    page = build_page(*loaded, "A page for tests")
    page.launch(**LAUNCH_OPTIONS, prevent_thread_lock=True, quiet=True)
    yield page
    page.close()


@pytest.fixture
def client(page):
    return Client(page.local_url, verbose=False)


def truth(loaded, image: Image.Image, layer: int = LAYERS, head: int | str = "mean"):
    """By hand: (class name -> probability, seen, classic, colour), the last three as uint8 (32, 32, 3)."""
    model, processor = loaded
    pixel_values = processor(image, return_tensors="pt").pixel_values
    with torch.no_grad():
        output = model(pixel_values, output_attentions=True)
    small = torch.from_numpy(np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)) / 255).float()
    small = small.permute(2, 0, 1)[None]
    attention_map = cls_map(output.attentions, layer - 1, head if head == "mean" else head - 1).values
    pictures = [small, classic_overlay(attention_map, small), colour_overlay(attention_map, small)]
    pictures = [(picture[0] * 255).round().byte().permute(1, 2, 0).numpy() for picture in pictures]
    return dict(zip(CIFAR10_CLASSES, output.logits[0].softmax(-1).tolist(), strict=True)), *pictures


def pixels(path: str) -> np.ndarray:
    """The page's picture, one pixel for each square."""
    picture = Image.open(path)
    small = picture.resize((32, 32), Image.Resampling.NEAREST)
    assert picture.format == "PNG"
    assert np.array_equal(np.asarray(small.resize(picture.size, Image.Resampling.NEAREST)), np.asarray(picture))
    return np.asarray(small)


def close(picture: np.ndarray, expected: np.ndarray) -> bool:
    return np.abs(picture.astype(int) - expected).max() <= 1


def predict(client: Client, path: Path, layer: int = LAYERS, head: int | str = "mean"):
    answer, *pictures = client.predict(handle_file(path), layer, head, api_name="/predict")
    return {row["label"]: row["confidence"] for row in answer["confidences"]}, *map(pixels, pictures)


@pytest.mark.parametrize(("layer", "head"), [(LAYERS, "mean"), (1, "mean"), (1, 1), (LAYERS, HEADS)])
def test_answer_and_pictures_are_the_models_own(loaded, client, layer, head):
    path = EXAMPLES / "frog.png"
    probabilities, *pictures = predict(client, path, layer, head)
    expected, *expected_pictures = truth(loaded, open_image(path), layer, head)
    assert probabilities == pytest.approx(expected, abs=1e-6)
    assert all(close(picture, other) for picture, other in zip(pictures, expected_pictures, strict=True))


def test_another_layer_or_head_redraws_without_an_upload(loaded, client):
    path = EXAMPLES / "ship.png"
    predict(client, path)
    drawn = []
    for layer, head in [(1, "mean"), (LAYERS, 2), (LAYERS, "mean")]:
        pictures = [pixels(picture) for picture in client.predict(layer, head, api_name="/redraw")]
        _, _, *expected = truth(loaded, open_image(path), layer, head)
        assert all(close(picture, other) for picture, other in zip(pictures, expected, strict=True))
        drawn.append(pictures)
    for first, second in [(0, 1), (1, 2), (0, 2)]:
        assert not close(drawn[first][0], drawn[second][0]) and not close(drawn[first][1], drawn[second][1])


def test_visitors_keep_their_own_pictures(loaded, page):
    visitors = {path: Client(page.local_url, verbose=False) for path in sorted(EXAMPLES.glob("*.png"))[:4]}
    jobs = [c.submit(handle_file(path), LAYERS, "mean", api_name="/predict") for path, c in visitors.items()]
    for (path, client), job in zip(visitors.items(), jobs, strict=True):
        expected = truth(loaded, open_image(path))
        assert job.result(timeout=PATIENCE)[0]["label"] == max(expected[0], key=expected[0].get)
        assert close(pixels(client.predict(LAYERS, "mean", api_name="/redraw")[0]), expected[2])


def test_the_upload_goes_through_the_door_for_images(loaded, client, tmp_path):
    """Gradio's own decoding clips 16 bits to white, and shows the colour under an alpha of 0."""
    frog = open_image(EXAMPLES / "frog.png")
    _, seen, *_ = truth(loaded, frog)
    deep = tmp_path / "deep.png"
    Image.fromarray(np.asarray(frog.convert("L")).astype(np.uint16) * 257).save(deep)
    assert close(predict(client, deep)[1], np.asarray(frog.convert("L").convert("RGB")))
    clear = tmp_path / "clear.png"
    Image.merge("RGBA", [*frog.split(), Image.new("L", frog.size, 0)]).save(clear)
    assert (predict(client, clear)[1] == 255).all()
    turned = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[274] = 6  # to be shown turned by 90 degrees
    frog.transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    assert close(predict(client, turned)[1], seen)


def bad_files() -> dict[str, bytes]:
    buffer = BytesIO()
    Image.new("1", (13000, 13000)).save(buffer, "PNG")  # small as a file, huge when decoded
    return {
        "words.png": b"these are words",
        "empty.png": b"",
        "half.png": (EXAMPLES / "cat.png").read_bytes()[:900],
        "bomb.png": buffer.getvalue(),
        "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    }


@pytest.mark.parametrize("name", bad_files())
def test_a_bad_file_is_one_line_and_the_next_one_works(loaded, client, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(bad_files()[name])
    with pytest.raises(AppError, match=r"^the upload: expected .+, got .+$") as error:
        predict(client, path)
    assert "\n" not in str(error.value) and str(tmp_path) not in str(error.value)
    good = EXAMPLES / "horse.png"
    assert predict(client, good)[0] == pytest.approx(truth(loaded, open_image(good))[0], abs=1e-6)


def test_layers_and_heads_that_are_not_there(client):
    for layer, head in [(0, "mean"), (LAYERS + 1, "mean"), (1, 0), (1, HEADS + 1), ("1", "mean"), (None, None)]:
        with pytest.raises(AppError, match="^expected a layer of"):
            predict(client, EXAMPLES / "cat.png", layer, head)


def test_only_uploaded_files_are_opened(page, tmp_path):
    """Without the `meta` key gradio checks nothing: a path of the server reaches the function as it is."""
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    data_url = "data:image/png;base64,iVBORw0KGgo="
    for upload in [
        {"path": str(secret)},
        {"path": None, "url": data_url},
        {"url": data_url},
        {"path": str(tmp_path)},
        None,
    ]:
        with pytest.raises(ImageError, match="expected a file, got none"):
            open_upload(upload, str(tmp_path / "uploads"))
        answer = httpx.post(
            f"{page.local_url}gradio_api/call/predict", json={"data": [upload, 1, "mean"]}, timeout=PATIENCE
        )
        if answer.status_code == 200:
            event = answer.json()["event_id"]
            answer = httpx.get(f"{page.local_url}gradio_api/call/predict/{event}", timeout=PATIENCE)
            assert "event: error" in answer.text and "event: complete" not in answer.text, upload


def test_examples_are_real_test_images_of_every_class():
    table = pyarrow.parquet.read_table(EXAMPLES.parent / "sample" / "test.parquet").to_pylist()
    rows = {
        np.asarray(Image.open(BytesIO(row["img"]["bytes"]))).tobytes(): CIFAR10_CLASSES[row["label"]] for row in table
    }
    examples = {path: rows[np.asarray(Image.open(path)).tobytes()] for path in EXAMPLES.glob("*.png")}
    assert all(path.stem.partition("_")[0] == name for path, name in examples.items())
    assert set(examples.values()) == set(CIFAR10_CLASSES)


def test_example_icons_outlive_the_cleaning_of_the_cache(loaded):
    page = build_page(*loaded, "A page that is not launched")
    delete_files_created_by_app(page, age=None)
    icons = [block.icon["path"] for block in page.blocks.values() if getattr(block, "icon", None)]
    assert len(icons) >= 10 and all(Path(icon).is_file() for icon in icons)


def test_nothing_is_recorded_or_monitored(page):
    config = page.get_config_file()
    assert not config["analytics_enabled"] and not config["run_history"]
    assert page.max_file_size and page._queue.max_size
    for address in ("monitoring", "monitoring/summary", "gradio_api/runs"):
        assert httpx.get(page.local_url + address, timeout=PATIENCE).status_code in (403, 404), address


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.exists():
        skip_or_fail(f"{CHROMIUM} is missing")
    expect.set_options(timeout=PATIENCE * 1000)
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A browser tab on the page that remembers what went wrong in it."""

    def __init__(self, browser: Browser, url: str, theme: str, width: int):
        self.tab = browser.new_page(viewport={"width": width, "height": 844})
        self.tab.set_default_timeout(PATIENCE * 1000)
        self.events = events = []
        self.tab.on("console", lambda m: events.append(f"{m.text} {m.location}") if m.type == "error" else None)
        self.tab.on("pageerror", lambda error: events.append(str(error)))
        self.tab.on("requestfailed", lambda r: events.append(f"{r.failure} {r.url}") if self.counts(r) else None)
        self.tab.on("response", lambda r: events.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        self.tab.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else events.append(r.url))
        self.tab.goto(f"{url}?__theme={theme}")
        self.tab.wait_for_selector("#answer h2")

    @staticmethod
    def counts(request: Request) -> bool:
        return "ERR_ABORTED" not in (request.failure or "")  # a stream that the page itself has closed

    @property
    def trouble(self) -> list[str]:
        """Without gradio's progress bar, which gives up if an upload is not under way within 3 seconds."""
        late = any("upload_progress" in event for event in self.events)
        return [
            event for event in self.events if not (late and ("upload_progress" in event or event[:8] == "Response"))
        ]

    def picture(self, name: str) -> str:
        return self.tab.get_by_alt_text(name).get_attribute("src")

    def wait_for_another(self, name: str, than: str) -> None:
        self.tab.wait_for_function(
            "([name, src]) => ![null, undefined, src].includes(document.querySelector(`img[alt='${name}']`)?.src)",
            arg=[name, than],
        )

    def wait_for_answer(self, probabilities: dict[str, float]) -> None:
        """Until the page shows the likeliest class in its heading and as its first bar, with its percentage."""
        name = max(probabilities, key=probabilities.get)
        heading = self.tab.locator("#answer h2", has_text=re.compile(f"^{name}$"))
        bar = self.tab.locator("#answer .confidence-set").first
        expect(heading).to_be_visible()
        expect(bar).to_have_text(re.compile(rf"^\s*{name}\s*{round(100 * probabilities[name])}%\s*$"))


SEEN, CLASSIC = "Your picture, shrunk", "Your picture, dark where the model attends little"


@pytest.mark.parametrize(
    ("theme", "width"), [("light", 1280), ("dark", 1280), ("light", 390)], ids=["desktop", "dark", "phone"]
)
def test_in_a_browser(loaded, page, browser, tmp_path, theme, width):
    visit = Visit(browser, page.local_url, theme, width)
    tab = visit.tab
    assert tab.title() == tab.inner_text("h1") == "A page for tests"
    dark = tab.evaluate("getComputedStyle(document.querySelector('h1')).color.match(/\\d+/)[0] > 128")  # light text
    assert dark == (theme == "dark")
    visit.wait_for_answer(truth(loaded, open_image(EXAMPLES / "dog.png"))[0])

    seen = visit.picture(SEEN)
    tab.get_by_role("button", name="frog icon").click()
    visit.wait_for_another(SEEN, seen)
    visit.wait_for_answer(truth(loaded, open_image(EXAMPLES / "frog.png"))[0])

    classic = visit.picture(CLASSIC)
    tab.get_by_role("group").filter(has_text="Layer").get_by_role("radio").first.focus()
    tab.keyboard.press("Space")
    visit.wait_for_another(CLASSIC, classic)
    classic = visit.picture(CLASSIC)
    tab.get_by_role("group").filter(has_text="Head").get_by_label("3", exact=True).click()
    visit.wait_for_another(CLASSIC, classic)

    photo = ImageOps.mirror(open_image(EXAMPLES / "truck.png")).resize((300, 500))
    photo.save(tmp_path / "photo.png")
    seen = visit.picture(SEEN)
    tab.set_input_files("#source input[type=file]", tmp_path / "photo.png")
    visit.wait_for_another(SEEN, seen)
    visit.wait_for_answer(truth(loaded, photo)[0])

    seen = visit.picture(SEEN)
    with tab.expect_file_chooser() as chooser:
        tab.get_by_role("button", name="Upload a picture").click()
    chooser.value.set_files(EXAMPLES / "bird.png")
    visit.wait_for_another(SEEN, seen)
    visit.wait_for_answer(truth(loaded, open_image(EXAMPLES / "bird.png"))[0])

    right_edges = "[...document.querySelectorAll('main *')].map((element) => element.getBoundingClientRect().right)"
    assert tab.evaluate(f"Math.max(...{right_edges})") <= width
    tab.wait_for_function("[...document.images].every((image) => image.complete && image.naturalWidth)")
    assert tab.evaluate("[...document.images].filter((image) => !image.alt).length") == 0
    assert tab.evaluate("getComputedStyle(document.querySelector('#seen img')).imageRendering") == "pixelated"
    assert tab.locator("footer a").count() == 0
    assert visit.trouble == []
    tab.close()


def test_a_bad_file_in_a_browser(loaded, page, browser, tmp_path):
    visit = Visit(browser, page.local_url, "light", 1280)
    (tmp_path / "words.png").write_text("these are words")
    visit.tab.set_input_files("#source input[type=file]", tmp_path / "words.png")
    visit.tab.get_by_text("the upload: expected an image").wait_for()  # in strict mode: one message, not two
    visit.tab.wait_for_selector("#answer h2", state="detached")
    assert visit.tab.locator("#answer h2").count() == 0  # no answer to the picture before stays on the page
    visit.tab.get_by_role("button", name="ship icon").click()
    visit.tab.wait_for_selector("#answer h2")
    visit.wait_for_answer(truth(loaded, open_image(EXAMPLES / "ship.png"))[0])
    visit.tab.close()


def test_clearing_and_dropping_in_a_browser(loaded, page, browser):
    visit = Visit(browser, page.local_url, "light", 1280)
    seen = visit.picture(SEEN)
    file = visit.tab.evaluate_handle(
        """async () => {
            const picture = [...document.images].find((image) => image.alt === "deer icon");
            const transfer = new DataTransfer();
            transfer.items.add(new File([await (await fetch(picture.src)).blob()], "deer.png", { type: "image/png" }));
            return transfer;
        }"""
    )
    visit.tab.dispatch_event("#source .upload-container", "drop", {"dataTransfer": file})
    visit.wait_for_another(SEEN, seen)
    visit.wait_for_answer(truth(loaded, open_image(EXAMPLES / "deer.png"))[0])

    visit.tab.get_by_label("Remove Image").click()
    visit.tab.wait_for_selector("#answer h2", state="detached")
    assert visit.tab.get_by_alt_text(SEEN).count() == visit.tab.get_by_alt_text(CLASSIC).count() == 0
    assert visit.trouble == []
    visit.tab.close()


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_app_refuses_a_bad_model_in_one_line(tmp_path, how):
    name = str(tmp_path / "nothing here")
    if how == "flag":
        finished = run(sys.executable, "app.py", "--model", name)
    else:
        finished = run(sys.executable, "app.py", MODEL_ID=name)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert re.fullmatch(r"app\.py: model: expected .+, got .*nothing here.*\n", finished.stderr)


def test_app_without_gradio_says_what_to_install():
    hidden = "import sys, runpy; sys.modules['gradio'] = None; sys.argv = ['app.py']; "
    finished = run(sys.executable, "-c", hidden + "runpy.run_path('app.py', run_name='__main__')")
    assert finished.returncode == 2
    assert finished.stderr == 'app.py: the page needs gradio: pip install "vit-cifar[demo]"\n'


def test_app_serves_the_model_of_the_flag_to_this_machine_alone(tiny_model_folder, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"GRADIO_SERVER_PORT": str(port), "MODEL_ID": "not/this-one", "HF_HUB_OFFLINE": "1"}
    log = tmp_path / "log"
    with log.open("w") as file:
        command = [sys.executable, "app.py", "--model", str(tiny_model_folder)]
        app = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, stdout=file, stderr=subprocess.STDOUT, text=True
        )
    try:
        deadline = monotonic() + 3 * PATIENCE
        while f"http://127.0.0.1:{port}" not in log.read_text():
            assert app.poll() is None and monotonic() < deadline, log.read_text()
            sleep(0.2)
        config = httpx.get(f"http://127.0.0.1:{port}/config", timeout=PATIENCE).json()
        listening = [c.laddr.ip for c in psutil.Process(app.pid).net_connections() if c.status == psutil.CONN_LISTEN]
    finally:
        app.kill()
        app.wait()
    assert tiny_model_folder.name in config["title"], json.dumps(config["title"])
    assert listening and set(listening) == {"127.0.0.1"}
