"""The page: a picture in, class probabilities and attention maps out."""

from pathlib import Path

import gradio as gr
from transformers import ViTImageProcessor

from ..images import ImageError, open_image
from ..modeling_vit_cifar import ViTCifarForImageClassification
from .look import MEAN, Look, attention_pictures, look, open_upload, to_picture

EXAMPLES = Path(__file__).parent / "assets" / "examples"
FIRST_EXAMPLE = "dog.png"

CSS = """
.gradio-container main { max-width: 980px; margin: 0 auto !important; }
#top, #maps { display: grid; gap: 16px; align-items: start; }
#top { grid-template: auto 1fr / 1fr 1fr 1.25fr; grid-template-areas: "source seen answer" "examples examples answer"; }
#maps { grid-template-columns: 1.25fr 1fr 1fr; margin-top: 8px; }
#top > *, #maps > * { width: 100%; min-width: 0 !important; margin: 0; }
#source { grid-area: source; align-self: stretch; contain: size; }
#seen { grid-area: seen; }
#answer { grid-area: answer; }
#examples { grid-area: examples; display: grid; grid-template-columns: repeat(6, 1fr); gap: 4px; }
#examples > .block, #examples > .primary { grid-column: 1 / -1; margin-bottom: 4px; }
#examples > .secondary { flex-direction: column; gap: 2px; min-width: 0 !important; padding: 4px 0; background: none;
    font-size: 12px; font-weight: normal; }
#examples > .secondary:hover { background: var(--button-secondary-background-fill-hover); }
#examples > .secondary img { width: min(52px, 80%); height: auto; aspect-ratio: 1; margin: 0; border-radius: 4px;
    image-rendering: pixelated; }
#source.block > label.float, .square.block > label.float { position: static; width: fit-content; border: none;
    background: none; white-space: nowrap; }
#source .image-container { height: calc(100% - 28px); }
#source .upload-container { width: 100% !important; }
#source .image-frame img { object-fit: contain; }
.square.block .image-container, .square.block .image-container button, .square.block .image-frame { width: 100%;
    height: auto; }
.square.block .image-frame img { aspect-ratio: 1; object-fit: fill; image-rendering: pixelated; }
.square .icon-button-wrapper { display: none; }
#maps fieldset label { padding: 6px 10px; }
#maps fieldset label:has(:focus-visible) { outline: 2px solid var(--primary-500); }
@media (max-width: 760px) {
    #top { grid-template: auto / 1fr 1fr; grid-template-areas: "source seen" "examples examples" "answer answer"; }
    #examples { grid-template-columns: repeat(4, 1fr); }
    #maps { grid-template-columns: 1fr 1fr; }
    #maps > :first-child { grid-column: 1 / -1; }
}
"""

# Fonts by name only, so that the page asks no other server for anything; teal dark enough for white text.
THEME = gr.themes.Base(primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["system-ui", "sans-serif"]).set(
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_hover_dark="*primary_800",
)
LAUNCH_OPTIONS = {
    "theme": THEME,
    "css": CSS,
    "footer_links": [],
    "run_history": False,
    "enable_monitoring": False,
    "max_file_size": "20mb",
    "ssr_mode": False,
}


def build_page(model: ViTCifarForImageClassification, processor: ViTImageProcessor, title: str) -> gr.Blocks:
    """The page for one model, ready for `.launch(**LAUNCH_OPTIONS)`."""
    config = model.config
    layers = list(range(1, config.num_hidden_layers + 1))
    heads = [MEAN, *range(1, config.num_attention_heads + 1)]

    def predict(upload: dict | None, layer: int, head: int | str) -> tuple:
        """Class probabilities, the image as the model saw it, and its attention as classic and as colour overlay."""
        if layer not in layers or head not in heads:
            raise gr.Error(f"expected a layer of {layers} and a head of {heads}, got {layer!r} and {head!r}")
        try:
            image = open_upload(upload, source.GRADIO_CACHE)
        except ImageError as error:
            raise gr.Error(str(error), print_exception=False) from error
        probabilities, seen = look(model, processor, image)
        return probabilities, to_picture(seen.image), *attention_pictures(seen, layer, head), seen

    def redraw(seen: Look | None, layer: int, head: int | str) -> tuple:
        """The two attention pictures of the image that is shown, for another layer or head."""
        return attention_pictures(seen, layer, head) if seen else (None, None)

    first = EXAMPLES / FIRST_EXAMPLE
    probabilities, seen = look(model, processor, open_image(first))
    classic, colour = attention_pictures(seen, layers[-1], MEAN)

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(
            f"# {title}\n"
            f"A Vision Transformer with {model.num_parameters() / 1e6:.2g} million parameters shrinks your picture to "
            f"{config.image_size} by {config.image_size} pixels and sorts it into one of {config.num_labels} classes. "
            "It cannot say “none of these”: whatever you show it, one of them wins."
        )
        square = {"elem_classes": "square", "format": "png", "interactive": False, "buttons": []}
        with gr.Row(elem_id="top"):
            source = gr.Image(
                first,
                label="Your picture",
                alt_text="The picture you chose",
                sources=["upload"],
                buttons=[],
                elem_id="source",
            )
            pixels = gr.Image(
                to_picture(seen.image),
                label="What it sees",
                alt_text="Your picture, shrunk",
                elem_id="seen",
                **square,
            )
            with gr.Row(elem_id="examples"):
                upload = gr.UploadButton("Upload a picture", file_types=["image"], variant="primary", size="md")
                gr.Markdown("or take a CIFAR-10 test image, named by what it shows:")
                examples = [
                    gr.Button(path.stem.partition("_")[0], icon=path, size="sm")
                    for path in sorted(EXAMPLES.glob("*.png"))
                ]
            answer = gr.Label(probabilities, label="What it says", num_top_classes=10, elem_id="answer")
        with gr.Row(elem_id="maps"):
            with gr.Column():
                gr.Markdown(
                    "## Attention\n"
                    "The answer is read from one token. These pictures show how much that token attends to each patch: "
                    "“classic” darkens what it passes over, “colour” runs from blue (little) to yellow (much).\n\n"
                    "Attention is not an explanation: it shows where the model gathers from, not why it decides."
                )
                layer = gr.Radio(layers, value=layers[-1], label="Layer")
                head = gr.Radio(heads, value=MEAN, label="Head")
            classic = gr.Image(
                classic, label="Classic", alt_text="Your picture, dark where the model attends little", **square
            )
            colour = gr.Image(
                colour, label="Colour", alt_text="Your picture under a colour map of the model's attention", **square
            )
        state = gr.State(seen)

        # preprocess=False, because gradio decodes the file before any check. source.upload and source.clear, because
        # source.change comes twice for one upload. One concurrency_id, so that what comes first is answered first.
        outputs = [answer, pixels, classic, colour, state]
        options = {"preprocess": False, "show_progress": "minimal", "concurrency_id": "picture"}
        shown = source.upload(predict, [source, layer, head], outputs, api_name="predict", **options)
        source.clear(lambda: [None] * 5, None, outputs, api_visibility="private", **options)
        uploaded = upload.upload(
            lambda file, layer, head: (file["path"], *predict(file, layer, head)),
            [upload, layer, head],
            [source, *outputs],
            api_visibility="private",
            **options,
        )
        for event in (shown, uploaded):  # no answer to an earlier picture stays beside one that cannot be read
            event.failure(
                lambda: [None] * 6, None, [source, *outputs], api_visibility="private", show_progress="hidden"
            )
        for button in examples:
            icon = button.icon["path"]
            button.keep_in_cache.add(icon)  # or delete_cache takes the icons away after an hour
            button.click(
                lambda layer, head, icon=icon: (icon, *predict({"path": icon}, layer, head)),
                [layer, head],
                [source, *outputs],
                api_visibility="private",
                **options,
            )
        gr.on(
            [layer.input, head.input],
            redraw,
            [state, layer, head],
            [classic, colour],
            api_name="redraw",
            show_progress="hidden",
            trigger_mode="always_last",
            concurrency_id="picture",
        )
    return page.queue(max_size=32, api_open=False)
