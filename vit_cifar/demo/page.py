"""The page: a picture in, the answer out, and below them the tabs that say where the model looked."""

from collections.abc import Sequence
from pathlib import Path

import gradio as gr

from ..images import ImageError, open_image
from . import tabs
from .views import Subject, caution, open_upload, probabilities, to_picture

ASSETS = Path(__file__).parent / "assets"
EXAMPLES = ASSETS / "examples"
FIRST_EXAMPLE = "dog.png"

# Fonts by name only, so that the page asks no other server for anything; teal dark enough for white text.
THEME = gr.themes.Base(primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["system-ui", "sans-serif"]).set(
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
    "max_file_size": "20mb",
    "ssr_mode": False,
}


def build_page(subjects: Sequence[Subject]) -> gr.Blocks:
    """The page, ready for `.launch(**LAUNCH_OPTIONS)`: the first model at its root, each other one a link away."""
    first, *others = subjects
    with gr.Blocks(title=_title(first), analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        if others:
            gr.Navbar(main_page_name=first.name)
        _show(first)
    for subject in others:
        with page.route(subject.name):
            gr.Navbar(main_page_name=first.name)
            _show(subject)
    return page.queue(max_size=32, api_open=False)


def _title(subject: Subject) -> str:
    return f"Where {subject.name} looks"


def _show(subject: Subject) -> None:
    """One model's page. Letters in shapes as in the model file."""
    config, (rows, columns) = subject.model.config, subject.grid
    start = subject.pixels(open_image(EXAMPLES / FIRST_EXAMPLE))  # (1, 3, H, W); a tab keeps no more of a visitor
    chances = probabilities(subject, subject.look(start).logits[0])

    gr.Markdown(
        f"# {_title(subject)}\n"
        f"A Vision Transformer with {subject.model.num_parameters() / 1e6:.2g} million parameters. It shrinks your "
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
            to_picture(subject.seen(start)[0]),
            label="What it sees",
            alt_text="Your picture, shrunk",
            elem_id="seen",
            **tabs.SQUARE,
        )
        with gr.Row(elem_id="examples"):
            upload = gr.UploadButton("Upload a picture", file_types=["image"], variant="primary", size="md")
            gr.Markdown("or take a CIFAR-10 test image, named by what it shows:")
            examples = [
                gr.Button(path.stem.partition("_")[0], icon=path, size="sm") for path in sorted(EXAMPLES.glob("*.png"))
            ]
        with gr.Column(elem_id="answer"):
            answer = gr.Label(chances, label="What it says", num_top_classes=10)
            word = gr.Markdown(caution(chances))
    state = gr.State(start)
    with gr.Tabs():
        maps = tabs.methods(subject, state)
        parts = [maps, tabs.layers_and_heads(subject, state), tabs.hide_patches(subject, state)]
        tabs.mistakes(subject)

    own = [answer, word, pixels, state]
    outputs = [*own, *(component for part in parts for component in part.outputs)]
    empty = [None] * len(outputs)

    def predict(upload: dict | None, *choices: object) -> list:
        """Class probabilities, the plain word, the image as the model saw it, and what each tab shows of it."""
        try:
            pixel_values = subject.pixels(open_upload(upload, source.GRADIO_CACHE))
        except ImageError as error:
            raise gr.Error(str(error), print_exception=False) from error
        seen = subject.look(pixel_values)
        drawn = [value for part in parts for value in part.draw(seen, *(choices if part is maps else []))]
        chances = probabilities(subject, seen.logits[0])
        picture = to_picture(
            subject.seen(pixel_values)[0], {"model": subject.name, "answer": max(chances, key=chances.get)}
        )
        return [chances, caution(chances), picture, pixel_values, *drawn]

    # preprocess=False, because gradio decodes the file before any check. source.upload and source.clear, because
    # source.change comes twice for one upload. One concurrency_id, so that what comes first is answered first.
    options = {"preprocess": False, "show_progress": "minimal", "concurrency_id": "picture"}
    events = [
        source.upload(predict, [source, *maps.inputs], outputs, api_name="predict", **options),
        upload.upload(
            lambda file, *choices: [file["path"], *predict(file, *choices)],
            [upload, *maps.inputs],
            [source, *outputs],
            api_visibility="private",
            **options,
        ),
    ]
    for button in examples:
        icon = button.icon["path"]
        button.keep_in_cache.add(icon)  # or delete_cache takes the icons away after an hour
        events.append(
            button.click(
                lambda *choices, icon=icon: [icon, *predict({"path": icon}, *choices)],
                maps.inputs,
                [source, *outputs],
                api_visibility="private",
                **options,
            )
        )
    source.clear(lambda: empty, None, outputs, api_visibility="private", **options)
    for event in events:
        # No answer to an earlier picture stays beside one that cannot be read.
        event.failure(
            lambda: [None, *empty], None, [source, *outputs], api_visibility="private", show_progress="hidden"
        )
        for part in parts:
            part.follow(event)
