import json
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import psutil
import pyarrow.parquet
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from gradio_client.utils import QueueError
from helpers import CHROMIUM, PATIENCE, ROOT, run_here, served, skip_or_fail
from PIL import Image, ImageOps
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

from tests.faults.images import bomb
from vit_cifar import CIFAR10_CLASSES
from vit_cifar.demo import tabs, views
from vit_cifar.demo.page import EXAMPLES, LAUNCH_OPTIONS, build_page
from vit_cifar.demo.views import Subject, open_upload
from vit_cifar.evaluation.examination import examine
from vit_cifar.explain.attention import cls_map
from vit_cifar.explain.overlay import classic_overlay, colour_overlay
from vit_cifar.images import ImageError, open_image
from vit_cifar.models import load_model
from vit_cifar.training.data import load_split

LAYERS, HEADS = 2, 4


@pytest.fixture(scope="module")
def subject(tiny_model_folder) -> Subject:
    """Random weights, made decisive: different pictures get different answers."""
    model, processor = load_model(str(tiny_model_folder))
    with torch.no_grad():
        model.classifier.weight.mul_(40)
        for layer in model.vit.layers:
            layer.attention.q_proj.weight.mul_(10)
            layer.attention.k_proj.weight.mul_(10)
    validation, test = (load_split("sample", split) for split in ("train", "test"))
    return Subject("the-first", model, processor, examine(model, processor, validation, test, images=4))


@pytest.fixture(scope="module")
def other(tiny_model_folder) -> Subject:
    """A second model for the picker, which has not been examined."""
    return Subject("the-second", *load_model(str(tiny_model_folder)))


@pytest.fixture(scope="module")
def page(subject, other):
    page = build_page([subject, other])
    page.launch(**LAUNCH_OPTIONS, prevent_thread_lock=True, quiet=True)
    yield page
    page.close()


@pytest.fixture
def client(page):
    return Client(page.local_url, verbose=False)


def truth(subject, image: Image.Image, layer: int = LAYERS, head: str = "mean"):
    """By hand: (class name -> probability, seen, classic, colour), the last three as uint8 (32, 32, 3)."""
    pixel_values = subject.processor(image, return_tensors="pt").pixel_values
    with torch.no_grad():
        output = subject.model(pixel_values, output_attentions=True)
    small = torch.from_numpy(np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)) / 255).float()
    small = small.permute(2, 0, 1)[None]
    attention_map = cls_map(output.attentions, layer - 1, int(head) - 1 if head.isdigit() else head).values
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


def chances(label: dict) -> dict[str, float]:
    """What a Label shows."""
    return {row["label"]: row["confidence"] for row in label["confidences"]}


def answer_of(subject: Subject, path: Path) -> str:
    probabilities = truth(subject, open_image(path))[0]
    return max(probabilities, key=probabilities.get)


# What `predict` and `redraw` give for each quick method: a picture and its caption.
FIGURES = ("classic", "attention", "rollout", "gradient rollout", "random")


@dataclass
class Prediction:
    """The outputs of `predict` by name; pictures as paths."""

    chances: dict[str, float]
    word: str
    seen: str
    pictures: dict[str, str]
    captions: dict[str, str]
    strip: str
    hidden: list


def predict(client: Client, path: Path, layer: int = LAYERS, head: str = "mean", api_name="/predict") -> Prediction:
    _, answer, word, seen, occlusion, _, *rest = client.predict(handle_file(path), "", layer, head, api_name=api_name)
    assert occlusion is None  # it comes a little later
    figures, (strip, *hidden) = rest[:10], rest[10:]
    return Prediction(
        chances(answer),
        word,
        seen,
        dict(zip(FIGURES, figures[::2], strict=True)),
        dict(zip(FIGURES, figures[1::2], strict=True)),
        strip,
        hidden,
    )


@pytest.mark.parametrize(("layer", "head"), [(LAYERS, "mean"), (1, "max"), (1, "1"), (LAYERS, str(HEADS))])
def test_answer_and_pictures_are_the_models_own(subject, client, layer, head):
    path = EXAMPLES / "frog.png"
    found = predict(client, path, layer, head)
    expected, seen, classic, colour = truth(subject, open_image(path), layer, head)
    assert found.chances == pytest.approx(expected, abs=1e-6)
    assert found.word == views.caution(subject, expected)
    for path, picture in (
        (found.seen, seen),
        (found.pictures["classic"], classic),
        (found.pictures["attention"], colour),
    ):
        assert close(pixels(path), picture)
    assert len({Path(path).read_bytes() for path in found.pictures.values()}) == len(FIGURES)


def test_a_downloaded_picture_says_what_it_shows(subject, client):
    path = EXAMPLES / "frog.png"
    found = predict(client, path, 1, "3")
    for name in FIGURES:
        said = Image.open(found.pictures[name]).text
        assert said["model"] == "the-first"
        assert said["method"] == name.replace("classic", "attention")
        assert (said.get("layer"), said.get("head")) == (("1", "3") if said["method"] == "attention" else (None, None))
        assert name == "classic" or f"minimum {said['minimum']}, maximum" in found.captions[name]
    assert Image.open(found.seen).text == {"model": "the-first", "answer": answer_of(subject, path)}
    assert Image.open(found.strip).text["layer"] == f"1 to {LAYERS}"


def test_the_first_picture_says_so_too(subject, page):
    first = next(block for block in page.blocks.values() if getattr(block, "elem_id", None) == "seen")
    said = Image.open(first.value["path"]).text
    assert said == {"model": "the-first", "answer": answer_of(subject, EXAMPLES / "dog.png")}


def test_another_layer_or_head_redraws_without_an_upload(subject, client):
    path = EXAMPLES / "ship.png"
    predict(client, path)
    drawn = []
    for layer, head in [(1, "mean"), (LAYERS, "2"), (LAYERS, "mean")]:
        figures = client.predict("", layer, head, api_name="/redraw")
        pictures = [pixels(picture) for picture in (figures[0], figures[2])]
        _, _, *expected = truth(subject, open_image(path), layer, head)
        assert all(close(picture, other) for picture, other in zip(pictures, expected, strict=True))
        drawn.append(pictures)
    for first, second in [(0, 1), (1, 2), (0, 2)]:
        assert not close(drawn[first][0], drawn[second][0]) and not close(drawn[first][1], drawn[second][1])


def test_a_session_that_gradio_has_forgotten_is_not_shown_another_picture(client):
    """It starts anew, as this one does, without opening the page again."""
    assert all(not value for value in client.predict("", 1, "mean", api_name="/redraw"))
    assert all(not value for value in client.predict([3], api_name="/hide"))


def test_the_class_changes_what_is_explained(client):
    path = EXAMPLES / "ship.png"
    predict(client, path)
    drawn = {}
    for name in ("", "cat", "truck"):
        figures = client.predict(name, LAYERS, "mean", api_name="/redraw")
        occluded, caption = client.predict(name, api_name="/occlusion")
        drawn[name] = [*(pixels(figures[n]) for n in (2, 4, 6)), pixels(occluded)]
        said = Image.open(occluded).text
        assert said["method"] == "occlusion" and f"minimum {said['minimum']}, " in caption
        assert name == "" or said["class"] == Image.open(figures[6]).text["class"] == name
    attention, rolled, gradient, occluded = zip(drawn["cat"], drawn["truck"], strict=True)
    assert close(*attention) and close(*rolled) and not close(*gradient) and not close(*occluded)
    with pytest.raises(AppError, match="cow"):
        client.predict("cow", LAYERS, "mean", api_name="/redraw")


def test_hidden_patches_change_the_answer_as_painting_does(subject, client):
    path = EXAMPLES / "ship.png"
    predict(client, path)
    for patches in ([], [0, 9], list(range(60))):
        answer, picture, said = client.predict(patches, api_name="/hide")
        expected, _, words = views.hidden(subject, subject.pixels(open_image(path)), patches)
        assert chances(answer)[answer["label"]] == pytest.approx(max(expected.values()), abs=1e-5)
        assert said == words
        assert Image.open(picture).text["hidden patches"] == str(patches)


def test_mistakes_of_a_pair(subject, client):
    label, answer = views.commonest_mistake(subject.examination)
    gallery, said = client.predict(label, answer, api_name="/mistakes")
    pictures, words = views.mistakes(subject, label, answer)
    assert said == words and [row["caption"] for row in gallery] == [caption for _, caption in pictures]


def test_of_many_classes_the_mistakes_are_chosen_by_name(subject, monkeypatch):
    """A table of them could be neither read nor clicked."""
    table, words = 'class="confusion"', "Choose a class and an answer to see its images"
    shown = str(build_page([subject]).get_config_file())
    assert table in shown and words not in shown
    monkeypatch.setattr(tabs, "MAX_IN_TABLE", 9)
    shown = str(build_page([subject]).get_config_file())
    assert table not in shown and words in shown


def test_each_model_has_its_own_page(subject, other, client):
    path = EXAMPLES / "frog.png"
    assert predict(client, path).chances == pytest.approx(truth(subject, open_image(path))[0], abs=1e-6)
    found = predict(client, path, api_name="/predict_1")
    assert found.chances == pytest.approx(truth(other, open_image(path))[0], abs=1e-6)
    assert Image.open(found.strip).text["model"] == "the-second"


def test_visitors_keep_their_own_pictures(subject, page):
    visitors = {path: Client(page.local_url, verbose=False) for path in sorted(EXAMPLES.glob("*.png"))[:4]}
    jobs = [c.submit(handle_file(path), "", LAYERS, "mean", api_name="/predict") for path, c in visitors.items()]
    for (path, client), job in zip(visitors.items(), jobs, strict=True):
        expected = truth(subject, open_image(path))
        assert job.result(timeout=PATIENCE)[1]["label"] == max(expected[0], key=expected[0].get)
        assert close(pixels(client.predict("", LAYERS, "mean", api_name="/redraw")[0]), expected[2])


def test_the_upload_goes_through_the_door_for_images(subject, client, tmp_path):
    """Gradio's own decoding clips 16 bits to white, and shows the colour under an alpha of 0."""
    frog = open_image(EXAMPLES / "frog.png")
    _, seen, *_ = truth(subject, frog)
    deep = tmp_path / "deep.png"
    Image.fromarray(np.asarray(frog.convert("L")).astype(np.uint16) * 257).save(deep)
    assert close(pixels(predict(client, deep).seen), np.asarray(frog.convert("L").convert("RGB")))
    clear = tmp_path / "clear.png"
    Image.merge("RGBA", [*frog.split(), Image.new("L", frog.size, 0)]).save(clear)
    assert (pixels(predict(client, clear).seen) == 255).all()
    turned = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[274] = 6  # to be shown turned by 90 degrees
    frog.transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    assert close(pixels(predict(client, turned).seen), seen)


@pytest.mark.parametrize("ending", ["tif", "ppm", "png"])
def test_what_browsers_cannot_draw_is_shown_as_something_that_they_can(client, tmp_path, ending):
    path = tmp_path / f"frog.{ending}"
    open_image(EXAMPLES / "frog.png").save(path)
    shown = client.predict(handle_file(path), "", LAYERS, "mean", api_name="/predict")[0]
    with Image.open(shown) as picture:
        assert picture.format == ("PNG" if ending == "png" else "WEBP")


def test_a_class_that_is_not_there(client):
    with pytest.raises(AppError, match="^class: expected one of .*cat.*, got 'cow'"):
        client.predict(handle_file(EXAMPLES / "cat.png"), "cow", LAYERS, "mean", api_name="/predict")


def bad_files() -> dict[str, bytes]:
    return {
        "words.png": b"these are words",
        "empty.png": b"",
        "half.png": (EXAMPLES / "cat.png").read_bytes()[:900],
        "bomb.png": bomb(13_000),
        "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    }


@pytest.mark.parametrize("name", bad_files())
def test_a_bad_file_is_one_line_and_the_next_one_works(subject, client, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(bad_files()[name])
    with pytest.raises(AppError, match=r"^the upload: expected .+, got .+$") as error:
        predict(client, path)
    assert "\n" not in str(error.value) and str(tmp_path) not in str(error.value)
    good = EXAMPLES / "horse.png"
    assert predict(client, good).chances == pytest.approx(truth(subject, open_image(good))[0], abs=1e-6)


def test_layers_and_heads_that_are_not_there(client):
    for layer, head in [(0, "mean"), (LAYERS + 1, "mean"), (1, "0"), (1, str(HEADS + 1)), ("1", "mean"), (None, None)]:
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
        {"path": "no\0file"},
        {"path": "a" * 300},
        None,
    ]:
        with pytest.raises(ImageError, match="expected a file, got none"):
            open_upload(upload, str(tmp_path / "uploads"))
        answer = httpx.post(
            f"{page.local_url}gradio_api/call/predict", json={"data": [upload, "", 1, "mean"]}, timeout=PATIENCE
        )
        assert answer.status_code == 200 or 400 <= answer.status_code < 500, upload
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


def test_nothing_is_recorded_or_monitored(page):
    config = page.get_config_file()
    assert not config["analytics_enabled"] and not config["run_history"]
    assert page.max_file_size and page._queue.max_size and len(page._queue.event_analytics) <= 1
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

    def __init__(self, browser: Browser, url: str, theme: str, width: int, script: str = ""):
        self.tab = browser.new_page(viewport={"width": width, "height": 844})
        self.tab.add_init_script(script)
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


SEEN, CLASSIC = "Your picture, resized", "Your picture, dark where the model attends little"
GRADIENT = "Your picture under a colour map of gradient rollout"
OCCLUSION = "Your picture under a colour map of occlusion"
VIEWS = pytest.mark.parametrize(
    ("theme", "width"), [("light", 1280), ("dark", 768), ("light", 390)], ids=["desktop", "tablet, dark", "phone"]
)


def looks_right(tab: Page, width: int) -> None:
    """What is shown fits the screen or scrolls, every picture has come and has words for those who do not see it."""
    elements = "[...document.querySelectorAll('main *:not(.scroller *)')]"
    assert tab.evaluate(f"Math.max(...{elements}.map((element) => element.getBoundingClientRect().right))") <= width
    images = tab.locator("main img:visible").all()
    assert len(images) >= 14  # the examples and the two pictures at the top, and the tab's own
    for image in images:
        image.scroll_into_view_if_needed()  # they are loaded when they come near
        tab.wait_for_function("(image) => image.complete && image.naturalWidth", arg=image.element_handle())
        assert image.get_attribute("alt")


@VIEWS
def test_in_a_browser(subject, page, browser, tmp_path, theme, width):
    visit = Visit(browser, page.local_url, theme, width)
    tab = visit.tab
    assert (tab.title(), tab.inner_text("h1")) == ("Where they look", "Where the-first looks")
    dark = tab.evaluate("getComputedStyle(document.querySelector('h1')).color.match(/\\d+/)[0] > 128")  # light text
    assert dark == (theme == "dark")
    visit.wait_for_answer(truth(subject, open_image(EXAMPLES / "dog.png"))[0])

    seen = visit.picture(SEEN)
    tab.get_by_role("button", name="frog icon").click()
    visit.wait_for_another(SEEN, seen)
    visit.wait_for_answer(truth(subject, open_image(EXAMPLES / "frog.png"))[0])

    photo = ImageOps.mirror(open_image(EXAMPLES / "truck.png")).resize((300, 500))
    photo.save(tmp_path / "photo.png")
    seen = visit.picture(SEEN)
    tab.set_input_files("#source input[type=file]", tmp_path / "photo.png")
    visit.wait_for_another(SEEN, seen)
    visit.wait_for_answer(truth(subject, photo)[0])

    seen = visit.picture(SEEN)
    with tab.expect_file_chooser() as chooser:
        tab.get_by_role("button", name="Upload a picture").click()
    chooser.value.set_files(EXAMPLES / "bird.png")
    visit.wait_for_another(SEEN, seen)
    visit.wait_for_answer(truth(subject, open_image(EXAMPLES / "bird.png"))[0])

    looks_right(tab, width)
    assert tab.locator("footer a").count() == 0
    for name in ("#seen img", "#methods img >> nth=0"):
        assert tab.locator(name).evaluate("(image) => getComputedStyle(image).imageRendering") == "pixelated"
    assert visit.trouble == []
    tab.close()


def test_nothing_can_be_asked_before_the_page_knows_its_picture(page, browser):
    """Over a slow line a choice would come before it, and take away the maps that are shown."""
    held = []
    tab = browser.new_page()
    tab.route("**/gradio_api/run/predict*", lambda route: held.append(route))
    tab.goto(page.local_url)
    layer = tab.get_by_role("group").filter(has_text="Layer").get_by_role("radio").first
    expect(tab.get_by_alt_text(CLASSIC)).to_be_visible()
    expect(layer).to_be_disabled()
    expect(tab.get_by_label("Class to explain")).to_be_disabled()
    while not held:
        tab.wait_for_timeout(100)
    held.pop().continue_()
    expect(layer).to_be_enabled()
    expect(tab.get_by_label("Class to explain")).to_be_enabled()
    tab.close()


@VIEWS
def test_the_tabs_in_a_browser(subject, page, browser, tmp_path, theme, width):
    visit = Visit(browser, page.local_url, theme, width)
    tab = visit.tab

    classic = visit.picture(CLASSIC)
    layer = tab.get_by_role("group").filter(has_text="Layer").get_by_role("radio").first
    expect(layer).to_be_enabled()
    layer.focus()
    tab.keyboard.press("Space")
    visit.wait_for_another(CLASSIC, classic)
    classic = visit.picture(CLASSIC)
    tab.get_by_role("group").filter(has_text="Head").get_by_label("3", exact=True).click()
    visit.wait_for_another(CLASSIC, classic)
    gradient, occlusion = visit.picture(GRADIENT), visit.picture(OCCLUSION)
    tab.get_by_label("Class to explain").click()
    tab.get_by_role("option", name="truck").click()
    visit.wait_for_another(GRADIENT, gradient)
    visit.wait_for_another(OCCLUSION, occlusion)
    looks_right(tab, width)
    gradient, occlusion = visit.picture(GRADIENT), visit.picture(OCCLUSION)
    tab.locator("#answer").get_by_role("button").filter(has_text="ship").click()
    visit.wait_for_another(GRADIENT, gradient)
    visit.wait_for_another(OCCLUSION, occlusion)
    expect(tab.get_by_label("Class to explain")).to_have_value("ship")
    with tab.expect_download() as download:
        tab.get_by_role("tabpanel").get_by_label("Download").nth(3).click()
    assert download.value.suggested_filename == "the-first-gradient_rollout-ship-colour.png"
    download.value.save_as(tmp_path / "map.png")
    said = Image.open(tmp_path / "map.png").text
    assert (said["model"], said["method"], said["class"]) == ("the-first", "gradient rollout", "ship")

    tab.get_by_role("tab", name="All heads").click()
    expect(tab.locator("#strip img")).to_be_visible()
    looks_right(tab, width)

    tab.get_by_role("button", name="frog icon").click()  # a tab that was never opened follows the picture too
    visit.wait_for_answer(truth(subject, open_image(EXAMPLES / "frog.png"))[0])
    tab.get_by_role("tab", name="Hide patches").click()
    expect(tab.get_by_text(f"0 of 64 patches hidden: {answer_of(subject, EXAMPLES / 'frog.png')}")).to_be_visible()
    for count, (row, column) in enumerate([(1, 1), (8, 8)], start=1):
        box = tab.get_by_label(f"row {row}, column {column}", exact=True)
        if count == 1:
            tab.locator("#cells label").first.click()
        else:
            box.focus()
            tab.keyboard.press("Space")
        expect(tab.get_by_text(f"{count} of 64 patches hidden")).to_be_visible()
        expect(box).to_be_checked()
    tab.keyboard.press("Shift+Tab")
    expect(tab.get_by_label("row 8, column 7", exact=True)).to_be_focused()
    tab.keyboard.press("Tab")
    tab.keyboard.press("Tab")  # past the last patch
    expect(tab.get_by_role("button", name="Hide the patch")).to_be_focused()
    box, picture = tab.locator("#cells").bounding_box(), tab.locator("#board img").bounding_box()
    assert box == pytest.approx(picture, abs=4)  # the boxes lie on the patches
    tab.get_by_role("button", name="Hide the patch").click()
    expect(tab.get_by_text("3 of 64 patches hidden")).to_be_visible()
    looks_right(tab, width)
    tab.get_by_role("button", name="Show all").click()
    expect(tab.get_by_text("0 of 64 patches hidden")).to_be_visible()
    assert tab.locator("#cells input:checked").count() == 0
    tab.get_by_label("Remove Image").click()
    tab.wait_for_selector("#answer h2", state="detached")
    tab.get_by_role("button", name="dog icon").click()  # without a picture no box lies over it
    visit.wait_for_answer(truth(subject, open_image(EXAMPLES / "dog.png"))[0])

    tab.get_by_role("tab", name="Mistakes").click()
    confusion = torch.tensor(subject.examination.record["confusion"])
    label, answer = (subject.classes[i] for i in (confusion == confusion.max()).nonzero()[0].tolist())
    cell = tab.locator(f".confusion button[data-label={label}][data-answer={answer}]")
    cell.focus()
    tab.keyboard.press("Enter")
    words = views.mistakes(subject, label, answer)[1].replace("**", "")
    expect(tab.get_by_text(words)).to_be_visible()
    assert tab.evaluate("getComputedStyle(document.querySelector('.scroller')).overflowX") == "auto"
    expect(tab.get_by_label("Images of", exact=True)).to_have_value(label)
    expect(tab.get_by_label("Answered", exact=True)).to_have_value(answer)
    looks_right(tab, width)
    tab.set_viewport_size({"width": 320, "height": 568})
    assert tab.evaluate("document.querySelector('.scroller').getBoundingClientRect().right") <= 320
    other = subject.classes[(subject.classes.index(label) + 1) % 10]
    tab.locator(f".confusion button[data-label={other}][data-answer={answer}]").click()
    expect(tab.get_by_text(views.mistakes(subject, other, answer)[1].replace("**", ""))).to_be_visible()
    assert visit.trouble == []
    tab.close()


def test_quick_clicks_leave_a_page_of_one_piece(subject, page, browser, monkeypatch):
    visit = Visit(browser, page.local_url, "light", 1280)
    for name in ("frog", "cat", "ship"):
        visit.tab.get_by_role("button", name=f"{name} icon").click()
    expect(visit.tab.get_by_alt_text("The picture you chose")).to_have_attribute("src", re.compile(r"ship\.png$"))
    visit.wait_for_answer(truth(subject, open_image(EXAMPLES / "ship.png"))[0])
    expect(visit.tab.get_by_alt_text(OCCLUSION)).to_be_visible()

    look = Subject.look
    monkeypatch.setattr(Subject, "look", lambda *choices: time.sleep(1) or look(*choices))
    visit.tab.get_by_role("button", name="frog icon").click()
    visit.tab.get_by_label("Remove Image").click()
    visit.tab.wait_for_selector("#answer h2", state="detached")
    visit.tab.wait_for_timeout(2000)  # nothing that was under way comes back
    for name in (SEEN, CLASSIC, OCCLUSION, "The picture you chose"):
        expect(visit.tab.get_by_alt_text(name)).to_have_count(0)

    visit.tab.get_by_role("tab", name="Mistakes").click()
    cells = [("cat", "dog"), ("dog", "cat")]
    for label, answer in cells:
        visit.tab.locator(f".confusion button[data-label={label}][data-answer={answer}]").click()
    expect(visit.tab.get_by_text(views.mistakes(subject, *cells[-1])[1].replace("**", ""))).to_be_visible()
    assert visit.trouble == []
    visit.tab.close()


@pytest.mark.parametrize("order", [["patch", "frog icon"], ["frog icon", "patch"], ["patch", "Show all"]])
def test_the_patches_that_are_hidden_are_those_of_the_boxes(subject, page, browser, monkeypatch, order):
    """Whichever is clicked while the other is under way."""
    visit = Visit(browser, page.local_url, "light", 1280)
    visit.tab.get_by_role("tab", name="Hide patches").click()
    box = visit.tab.get_by_label("row 1, column 1", exact=True)
    expect(box).to_be_enabled()
    look, hidden = Subject.look, views.hidden
    monkeypatch.setattr(Subject, "look", lambda *choices: time.sleep(1) or look(*choices))
    monkeypatch.setattr(views, "hidden", lambda *choices: time.sleep(1) or hidden(*choices))
    for what in order:
        if what == "patch":
            visit.tab.locator("#cells label").first.click()
        else:
            visit.tab.get_by_role("button", name=what).click()
    if "frog icon" in order:
        visit.wait_for_answer(truth(subject, open_image(EXAMPLES / "frog.png"))[0])
    visit.tab.wait_for_timeout(4000)  # whatever is still under way
    expect(box).not_to_be_checked()
    expect(visit.tab.get_by_text("0 of 64 patches hidden")).to_be_visible()
    assert visit.trouble == []
    visit.tab.close()


def test_the_picker_in_a_browser(page, browser):
    visit = Visit(browser, page.local_url, "light", 1280)
    visit.tab.get_by_role("link", name="the-second").click()
    expect(visit.tab.locator("h1")).to_have_text("Where the-second looks")
    visit.tab.get_by_role("tab", name="Mistakes").click()
    expect(visit.tab.get_by_text("the-second has not been examined: vit-cifar examine")).to_be_visible()
    assert visit.trouble == []
    visit.tab.close()


def test_a_bad_file_in_a_browser(subject, page, browser, tmp_path):
    visit = Visit(browser, page.local_url, "light", 1280)
    (tmp_path / "words.png").write_text("these are words")
    visit.tab.set_input_files("#source input[type=file]", tmp_path / "words.png")
    visit.tab.get_by_text("the upload: expected an image").wait_for()  # in strict mode: one message, not two
    visit.tab.wait_for_selector("#answer h2", state="detached")  # no answer to the picture before stays on the page
    expect(visit.tab.get_by_alt_text(OCCLUSION)).to_have_count(0)
    visit.tab.get_by_role("button", name="ship icon").click()
    visit.tab.wait_for_selector("#answer h2")
    visit.wait_for_answer(truth(subject, open_image(EXAMPLES / "ship.png"))[0])
    assert visit.trouble == []
    visit.tab.close()


def test_a_full_queue_says_so(subject, page, client, browser, monkeypatch):
    visit = Visit(browser, page.local_url, "light", 1280)
    body = {"data": [None, "", 1, "mean"]}
    with monkeypatch.context() as patch:
        patch.setattr(page._queue, "max_size", 0)
        with pytest.raises(QueueError, match="Queue is full! Please try again."):
            predict(client, EXAMPLES / "cat.png")
        answer = httpx.post(f"{page.local_url}gradio_api/call/predict", json=body, timeout=PATIENCE)
        assert answer.status_code == 503 and "Queue is full" in answer.json()["detail"]
        visit.tab.get_by_role("button", name="frog icon").click()
        visit.tab.get_by_text("This application is currently busy. Please try again.").first.wait_for()
        visit.tab.wait_for_selector("#answer h2", state="detached")  # the dog's answer is not left beside nothing
        expect(visit.tab.get_by_alt_text(OCCLUSION)).to_have_count(0)
    visit.tab.get_by_role("button", name="ship icon").click()
    visit.wait_for_answer(truth(subject, open_image(EXAMPLES / "ship.png"))[0])
    visit.tab.close()


# A drop clears the picture and uploads another. Here the page hears that both are done at one time.
BOTH_DONE = """
    const real = window.fetch;
    let answered, pass;
    const uploaded = new Promise((done) => answered = done), passed = new Promise((done) => pass = done);
    window.fetch = async (input, init) => {
        const answer = await real(input, init), url = String(input.url ?? input);
        if (url.includes("/upload?")) {
            answered();
            await passed;
        }
        if (!url.includes("/queue/data")) return answer;
        const chunks = answer.body.getReader();
        const body = new ReadableStream({
            async pull(page) {
                const { done, value } = await chunks.read();
                if (done) return page.close();
                if (new TextDecoder().decode(value).includes("process_completed")) {
                    await uploaded;
                    pass();
                    await new Promise((next) => setTimeout(next));
                }
                page.enqueue(value);
            },
        });
        return new Response(body, answer);
    };
"""


@pytest.mark.parametrize("script", ["", BOTH_DONE], ids=["as it comes", "both done at one time"])
def test_dropping_and_clearing_in_a_browser(subject, page, browser, script):
    visit = Visit(browser, page.local_url, "light", 1280, script)
    expect(visit.tab.get_by_label("Class to explain")).to_be_enabled()  # a drop on a page that is not ready is lost
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
    visit.wait_for_answer(truth(subject, open_image(EXAMPLES / "deer.png"))[0])

    visit.tab.get_by_label("Remove Image").click()
    visit.tab.wait_for_selector("#answer h2", state="detached")
    assert visit.tab.get_by_alt_text(SEEN).count() == visit.tab.get_by_alt_text(CLASSIC).count() == 0
    assert visit.trouble == []
    visit.tab.close()


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_app_refuses_a_bad_model_in_one_line(tmp_path, how, monkeypatch):
    name = str(tmp_path / "nothing here")
    if how == "flag":
        finished = run_here("app.py", "--model", name)
    else:
        monkeypatch.setenv("MODEL_ID", name)
        finished = run_here("app.py")
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert re.fullmatch(r"vit-cifar: model: expected .+, got .*nothing here.*\n", finished.stderr)


def test_app_without_gradio_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "vit_cifar.demo.page")
    finished = run_here("app.py")
    assert finished.returncode == 2
    assert finished.stderr == 'vit-cifar: the page: expected gradio, got none: pip install "vit-cifar[demo]"\n'


def test_app_serves_the_model_of_the_flag_to_this_machine_alone_and_leaves_nothing(tiny_model_folder, tmp_path):
    command = [sys.executable, ROOT / "app.py", "--model", tiny_model_folder]
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "another program's").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environment = {"MODEL_ID": "not/this-one", "GRADIO_TEMP_DIR": str(cache), "GRADIO_SERVER_PORT": port}
        with served(tmp_path, *command, **environment) as (app, url):
            config = httpx.get(f"{url}/config", timeout=PATIENCE).json()
            connections = psutil.Process(app.pid).net_connections()
            assert any(cache.glob("vit-cifar-*/*"))
            app.terminate()
            app.wait(PATIENCE)
    listening = [connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN]
    assert not url.endswith(f":{port}")  # which another program has
    assert tiny_model_folder.name in config["title"], json.dumps(config["title"])
    assert listening and set(listening) == {"127.0.0.1"}
    assert not any(cache.glob("vit-cifar-*")) and (cache / "another program's").exists()


@pytest.mark.parametrize(("prefix", "stays"), [(["env", "--default-signal=HUP"], False), (["nohup"], True)])
def test_app_ends_with_its_terminal_unless_told_not_to(tiny_model_folder, tmp_path, prefix, stays):
    with served(tmp_path, *prefix, sys.executable, ROOT / "app.py", "--model", tiny_model_folder) as (app, _):
        app.send_signal(signal.SIGHUP)
        try:
            app.wait(3 if stays else PATIENCE)
        except subprocess.TimeoutExpired:
            assert stays
        else:
            assert not stays
