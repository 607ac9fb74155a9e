"""The page: a picture in, the answer out, and below them the tabs that say where the model looked."""

import signal
from collections.abc import Sequence
from pathlib import Path

import gradio as gr
import torch
from starlette.middleware import Middleware

from ..errors import UserError
from ..images import open_image
from . import tabs
from .guard import UPLOAD_BYTES, Guard, keep_small, no_downloads, own_cache, whole_pictures
from .views import Subject, caution, load_subjects, open_upload, probabilities, seen_picture

ASSETS = Path(__file__).parent / "assets"
EXAMPLES = ASSETS / "examples"
FIRST_EXAMPLE = "dog.png"
DRAWN_BY_BROWSERS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")

# Fonts by name only, so that the page asks no other server for anything; teal dark enough for white text.
THEME = gr.themes.Base(primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["system-ui", "sans-serif"]).set(
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_hover_dark="*primary_800",
)
LAUNCH_OPTIONS = {
    "theme": THEME,
    "css_paths": ASSETS / "page.css",
    "footer_links": [],
    "run_history": False,
    "enable_monitoring": False,
    "max_file_size": UPLOAD_BYTES,
    "ssr_mode": False,
    "app_kwargs": {"middleware": [Middleware(Guard)]},
    "state_session_capacity": 1000,  # gradio keeps a whole page for each, 10,000 of them otherwise
}


def serve(model: str | None) -> None:
    """The page of this model, or of every model in the checkout, until the process is stopped.

    Raises:
        ModelError: there is no such model.
    """
    # One picture is too little work to share: threads that wait for each other made it slower, ten times so on a
    # machine that does something else as well.
    torch.set_num_threads(1)
    subjects = load_subjects(model)
    for name in ("SIGTERM", "SIGHUP"):  # or the cache would stay; Windows has no SIGHUP, and `nohup` wants none
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    no_downloads()
    with own_cache() as folder:
        page = build_page(subjects)
        keep_small(folder, page)
        page.launch(**LAUNCH_OPTIONS)


def build_page(subjects: Sequence[Subject]) -> gr.Blocks:
    """The page, ready for `.launch(**LAUNCH_OPTIONS)`: the first model at its root, each other one a link away."""
    whole_pictures()
    first, *others = subjects
    title = "Where they look" if others else _title(first)  # a page of several models has one for all
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        if others:
            gr.Navbar(main_page_name=first.name)
        _show(page, first)
    for number, subject in enumerate(others, start=2):
        with page.route(subject.name, f"model-{number}"):
            gr.Navbar(main_page_name=first.name)
            _show(page, subject)
    # By the second, because otherwise each event is told to everyone who waits: a quarter of the work under load.
    page.queue(max_size=32, api_open=False, status_update_rate=1)
    page._queue.ANALYTICS_MAX_EVENTS = 1  # gradio keeps 10,000 events, and sums them up anew after each
    return page


def _title(subject: Subject) -> str:
    return f"Where {subject.name} looks"


def _show(page: gr.Blocks, subject: Subject) -> None:
    """One model's page. Letters in shapes as in the model file."""
    config, (rows, columns) = subject.model.config, subject.grid
    start = subject.look(subject.pixels(open_image(EXAMPLES / FIRST_EXAMPLE)))
    chances = probabilities(subject, start.logits[0])

    gr.Markdown(
        f"# {_title(subject)}\n"
        f"A Vision Transformer with {subject.model.num_parameters() / 1e6:.2g} million parameters. It resizes your "
        f"picture to {config.image_size} by {config.image_size} pixels, cuts it into {rows * columns} patches, and "
        f"sorts it into one of {config.num_labels} classes."
    )
    with gr.Row(elem_id="top"):
        source = gr.Image(
            EXAMPLES / FIRST_EXAMPLE,
            label="Your picture",
            alt_text="The picture you chose",
            sources=["upload"],
            buttons=[],
            elem_id="source",
        )
        pixels = gr.Image(
            seen_picture(subject, start.pixel_values, chances),
            label="What it sees",
            alt_text="Your picture, resized",
            elem_id="seen",
            **tabs.SQUARE,
        )
        with gr.Row(elem_id="examples"):
            upload = gr.UploadButton("Upload a picture", file_types=["image"], variant="primary", size="md")
            gr.Markdown("or take a CIFAR-10 test image, named by what it shows:")
            examples = [
                gr.Button(path.stem.replace("_", " "), icon=path, size="sm") for path in sorted(EXAMPLES.glob("*.png"))
            ]
        with gr.Column(elem_id="answer"):
            answer = gr.Label(chances, label="What it says", num_top_classes=10)
            word = gr.Markdown(caution(subject, chances))
    # (1, 3, H, W); a browser's tab keeps no more. It is set when the page is opened, because gradio starts a session
    # that it has forgotten with the value given here: this picture's maps beside the visitor's own picture.
    state = gr.State()
    with gr.Tabs():
        maps = tabs.methods(subject, state, start, answer)
        parts = [tabs.layers_and_heads(subject, start), tabs.hide_patches(subject, state, start)]
        tabs.mistakes(subject)

    controls = [control for part in (maps, *parts) for control in part.controls]
    page.load(
        # A quick visitor's picture may come first.
        lambda known: [start.pixel_values if known is None else known, *[gr.update(interactive=True)] * len(controls)],
        state,
        [state, *controls],
        queue=False,
        api_visibility="private",
    )

    outputs = [source, answer, word, pixels, state]
    outputs += [component for part in (maps, *parts) for component in part.outputs]
    empty = [None] * len(outputs)
    failed = [None, None, "That picture got no answer. Upload another, or take one of the test images.", *empty[3:]]

    def predict(upload: dict | None, target: str, layer: int, head: str) -> list:
        """The picture, class probabilities, the plain word, the image as the model saw it, and what each tab shows."""
        try:
            image = open_upload(upload, source.GRADIO_CACHE)
            pixel_values = subject.pixels(image)
            seen = subject.look(pixel_values, target)
        except UserError as error:  # a picture that cannot be read, or a class that a program made up
            raise gr.Error(str(error), print_exception=False) from error
        drawn = [*maps.draw(seen, layer, head), *(value for part in parts for value in part.draw(seen))]
        chances = probabilities(subject, seen.logits[0])
        picture = seen_picture(subject, pixel_values, chances)
        shown = upload["path"] if Path(upload["path"]).suffix.lower() in DRAWN_BY_BROWSERS else image
        return [shown, chances, caution(subject, chances), picture, pixel_values, *drawn]

    # preprocess=False, because gradio decodes the file before any check. source.upload and source.clear, because
    # source.change comes twice for one upload. One concurrency_id, so that what comes first is answered first, and
    # every answer sets the picture too, so that the last one leaves a page of one piece.
    options = {
        "preprocess": False,
        "show_progress": "minimal",
        "trigger_mode": "multiple",
        "concurrency_id": "picture",
    }
    events = [
        source.upload(predict, [source, *maps.controls], outputs, api_name="predict", **options),
        upload.upload(
            predict, [upload, *maps.controls], outputs, api_name="upload", api_visibility="private", **options
        ),
    ]
    for button in examples:
        icon = button.icon["path"]
        events.append(
            button.click(
                lambda *choices, icon=icon: predict({"path": icon}, *choices),
                maps.controls,
                outputs,
                api_visibility="private",
                **options,
            )
        )
    # A picture dropped on another is a clear and then an upload: were the clear's answer to empty the picture too, it
    # would take away the new one that has just come. What an earlier answer has put back meanwhile goes, in the
    # browser: of a picture that it has uploaded it knows the size, of one that an answer sets it does not.
    cleared = source.clear(lambda: empty[1:], None, outputs[1:], api_visibility="private", **options)
    put_back_goes = "(shown) => shown && !shown.size ? null : { __type__: 'update' }"  # an update of nothing
    cleared.success(None, source, source, js=put_back_goes, api_visibility="private")
    events.append(cleared)
    for event in list(events):
        # No answer to an earlier picture stays beside one that cannot be read, or that found the queue full.
        shown = empty if event is cleared else failed
        events.append(
            event.failure(lambda shown=shown: shown, None, outputs, queue=False, api_visibility="private", **options)
        )
    for event in events:  # an empty page too, or the browser may put a slow map there that was under way
        maps.follow(event)
