"""The page's tabs, one function each: what it holds, and how it follows the picture."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import gradio as gr
import matplotlib
import torch
from gradio.components import Component
from gradio.events import Dependency

from ..evaluation.examination import calibration_words
from ..explain.overlay import COLORMAP
from ..explain.perturbation import METHODS, Look
from ..explain.pictures import Explanation
from . import views
from .views import Subject

PICTURE = {"elem_classes": "picture", "format": "png", "interactive": False, "buttons": ["download"]}
SQUARE = PICTURE | {"elem_classes": ["picture", "square"]}
MAX_IN_TABLE = 20  # classes: the numbers of more could be neither read nor clicked
QUICK = [name for name in METHODS if name != "occlusion"]  # occlusion asks the model once for each patch


@dataclass(frozen=True)
class Tab:
    """How a tab follows the picture.

    Attributes:
        outputs: what a new picture changes.
        draw: look at the picture -> the values of `outputs`; the maps' takes its controls' values as well.
        controls: what asks for another drawing of the same picture; off until the server knows the picture.
    """

    outputs: list[Component]
    draw: Callable[..., list]
    controls: list[Component]


@dataclass(frozen=True)
class Maps(Tab):
    """The tab whose controls outlast a picture: class (its name, "" for the model's answer), layer and head.

    Attributes:
        follow: given the event of a new picture, adds occlusion, which takes longer.
    """

    follow: Callable[[Dependency], None]


def methods(subject: Subject, state: gr.State, start: Look, answer: gr.Label) -> Maps:
    """Each method's map, side by side, for a class to choose here or by a click on its row of `answer`."""
    config = subject.model.config
    layers = list(range(1, config.num_hidden_layers + 1))
    heads = ["mean", "max", *map(str, range(1, config.num_attention_heads + 1))]

    def draw(seen: Look, layer: int, head: str) -> list:
        """The quick methods' pictures and captions, in the order of `quick` below."""
        if layer not in layers or head not in heads:
            message = f"expected a layer of {layers} and a head of {heads}, got {layer!r} and {head!r}"
            raise gr.Error(message, print_exception=False)
        attention, *others = (subject.explain(seen, name, layer, head) for name in QUICK)
        drawn = [views.overlay(attention, "classic"), ""]
        return drawn + [part for found in (attention, *others) for part in figure(found)]

    def redraw(pixel_values: torch.Tensor | None, target: str, layer: int, head: str) -> list:
        """The quick methods' pictures and captions of the picture that is shown, for another class, layer or head."""
        if pixel_values is None:
            return [None, ""] * (len(quick) // 2)
        return draw(subject.look(pixel_values, target), layer, head)

    def occlude(pixel_values: torch.Tensor | None, target: str) -> list:
        """Occlusion's picture and caption."""
        if pixel_values is None:
            return [None, ""]
        return figure(subject.explain(subject.look(pixel_values, target), "occlusion"))

    def choose(pixel_values: torch.Tensor | None, shown: dict[str, float], event: gr.SelectData) -> str:
        """The class whose row was clicked, as `target` names it."""
        if pixel_values is None:  # the page was opened just now, or so long ago that its picture is forgotten
            raise gr.Error("expected a picture, got none: choose one first", print_exception=False)
        return "" if event.value == max(shown, key=shown.get) else event.value

    def figure(found: Explanation) -> list:
        return [views.overlay(found), views.caption(subject, found)]

    with gr.Tab("Maps"), gr.Row(elem_id="maps"):
        with gr.Column():
            target = gr.Dropdown(
                [("its answer", ""), *subject.classes],
                value="",
                label="Class to explain",
                info="for gradient rollout and occlusion; or click it above",
                interactive=False,
            )
            layer = gr.Radio(layers, value=layers[-1], label="Layer", info="for attention", interactive=False)
            head = gr.Radio(heads, value="mean", label="Head", info="for attention", interactive=False)
            colours = ", ".join(matplotlib.colors.to_hex(matplotlib.colormaps[COLORMAP](i / 8)) for i in range(9))
            gr.HTML(f'<p class="scale">least <i style="background: linear-gradient(90deg, {colours})"></i> most</p>')
        with gr.Row(elem_id="methods"):
            quick, slow = [], []
            values = iter(draw(start, layers[-1], "mean"))
            quick += _figure("attention, classic", "Your picture, dark where the model attends little", values)
            for name in METHODS:
                own = iter(figure(subject.explain(start, "occlusion"))) if name == "occlusion" else values
                alt_text = f"Your picture under a colour map of {name}"
                (slow if name == "occlusion" else quick).extend(_figure(name, alt_text, own))
        with gr.Column(elem_id="words"):
            gr.Markdown(
                "Each map has a colour scale of its own: mind the numbers below it. Entropy is how evenly the map is "
                "spread over the patches; “class token to itself” is what it keeps for itself.\n\n"
                f"{views.score_words(subject)}\n\n"
                "Attention says where the class token read, and occlusion what changed when a patch went. Neither is a "
                "reason."
            )

    options = {"show_progress": "minimal", "trigger_mode": "always_last", "concurrency_id": "picture"}
    controls = [target, layer, head]
    gr.on([layer.input, head.input], redraw, [state, *controls], quick, api_name="redraw", **options)
    # "multiple": a delayed event of this kind would carry the first click's class.
    row = options | {"trigger_mode": "multiple", "api_visibility": "private"}
    clicked = answer.select(choose, [state, answer], target, **row)
    chosen = [
        target.input(redraw, [state, *controls], quick, api_visibility="private", **options),
        clicked.success(redraw, [state, *controls], quick, api_visibility="private", **options),
    ]

    def follow(event: Dependency, **api: str) -> None:
        event.success(occlude, [state, target], slow, **(api or {"api_visibility": "private"}), **options)

    follow(chosen[0], api_name="occlusion")
    follow(chosen[1])

    def draw_all(seen: Look, layer: int, head: str) -> list:
        return [None, "", *draw(seen, layer, head)]  # occlusion comes later

    return Maps([*slow, *quick], draw_all, controls, follow)


def _figure(label: str, alt_text: str, values: Iterator) -> list[Component]:
    with gr.Column(elem_classes="figure"):
        return [gr.Image(next(values), label=label, alt_text=alt_text, **SQUARE), gr.Markdown(next(values))]


def layers_and_heads(subject: Subject, start: Look) -> Tab:
    """Every head of every layer in one strip."""
    with gr.Tab("All heads"):
        gr.Markdown(
            "A row for each layer, from the first down; what the class token attends to, each in its own scale."
        )
        strip = gr.Image(
            views.strip(subject, start),
            label="attention",
            alt_text="Your picture under the attention of every head of every layer",
            elem_id="strip",
            **PICTURE,
        )
    return Tab([strip], lambda seen: [views.strip(subject, seen)], [])


def hide_patches(subject: Subject, state: gr.State, start: Look) -> Tab:
    """Patches to hide by click or by keyboard."""
    rows, columns = subject.grid

    def hide(pixel_values: torch.Tensor | None, patches: list[int]) -> tuple:
        """Probabilities, the picture and a sentence, while these patches, counted row by row from 0, are hidden."""
        if pixel_values is None:
            return None, None, ""
        return views.hidden(subject, pixel_values, patches)

    def hide_next(pixel_values: torch.Tensor | None, patches: list[int]) -> list[int]:
        """One more patch: of those still shown, the one that gradient rollout puts first."""
        if pixel_values is None or len(patches) == rows * columns:
            return patches
        return sorted([*patches, views.most_important(subject, pixel_values, patches)])

    with gr.Tab("Hide patches"), gr.Row(elem_id="hide"):
        names = [
            (f"row {row + 1}, column {column + 1}", row * columns + column)
            for row in range(rows)
            for column in range(columns)
        ]
        chances, picture, words = views.nothing_hidden(subject, start)
        # The boxes lie over the picture, one on each patch.
        with gr.Column(elem_id="board"):
            gr.HTML(f"<style>#board {{ --columns: {columns} }}</style>")
            board = gr.Image(
                picture,
                label="Click the patches to hide",
                alt_text="Your picture without the patches",
                **SQUARE | {"buttons": []},  # a button would lie over a patch
            )
            cells = gr.CheckboxGroup(
                names,
                value=[],
                label="Hidden patches",
                container=False,
                show_label=False,
                interactive=False,
                elem_id="cells",
            )
        with gr.Column():
            said = gr.Markdown(words)
            one_more = gr.Button("Hide the patch it looks at most", size="sm", interactive=False)
            none = gr.Button("Show all", size="sm", interactive=False)
            answer = gr.Label(chances, label="What it says now", num_top_classes=5)

    shown = [answer, board, said]
    options = {"show_progress": "hidden", "trigger_mode": "always_last", "concurrency_id": "picture"}
    # Whoever ticks or empties the boxes, the visitor, a button or a new picture: what is shown follows them.
    cells.change(hide, [state, cells], shown, api_name="hide", **options)
    one_more.click(hide_next, [state, cells], cells, api_visibility="private", **options)
    none.click(lambda: [], None, cells, api_visibility="private", **options)
    return Tab(
        [cells, *shown], lambda seen: [[], *views.nothing_hidden(subject, seen)], controls=[one_more, none, cells]
    )


def mistakes(subject: Subject) -> None:
    """What the model gets wrong on the test split, and how far its probabilities can be believed."""
    with gr.Tab("Mistakes"):
        examination = subject.examination
        if examination is None:
            gr.Markdown(
                f"{subject.name} has not been examined: `vit-cifar examine FOLDER` does it and needs the dataset."
            )
            return
        record = examination.record
        classes = record["classes"]

        def show(label: str, answer: str) -> tuple[list, str]:
            """The test images of a class that got an answer, each beside its map, and a sentence."""
            return views.mistakes(subject, label, answer)

        def show_cell(event: gr.EventData) -> tuple:
            return event.label, event.answer, *show(event.label, event.answer)

        label, answer = views.commonest_mistake(examination)
        pictures, words = show(label, answer)
        has_table = len(classes) <= MAX_IN_TABLE
        how = "A row for each class, a column for each answer: **click a number, or choose, to see its images.**"
        gr.Markdown(
            f"{record['test_accuracy']:.2%} of {record['images']['test']:,} test images are right. "
            f"{how if has_table else '**Choose a class and an answer to see its images.**'}"
        )
        with gr.Row():
            label = gr.Dropdown(classes, value=label, label="Images of", min_width=120)
            answer = gr.Dropdown(classes, value=answer, label="Answered", min_width=120)
        table = gr.HTML(
            views.confusion_table(examination) if has_table else "",
            js_on_load="""element.addEventListener("click", (event) => {
                const cell = event.target.closest("button");
                if (cell) trigger("click", {label: cell.dataset.label, answer: cell.dataset.answer});
            });""",
            apply_default_css=False,
        )
        said = gr.Markdown(words)
        gallery = gr.Gallery(
            pictures,
            label="Test images and their maps",
            show_label=False,
            columns=3,
            object_fit="contain",
            height=None,
            format="png",
            interactive=False,
            buttons=["download"],
            elem_id="mistakes",
        )
        gr.Markdown(
            f"## How far to believe its probabilities\n{calibration_words(examination.record)} "
            "Points above the line: it is right more often than it says; below, less often. "
            "The larger a point, the more images."
        )
        gr.Image(
            views.reliability_picture(subject),
            label="reliability diagram",
            alt_text=views.reliability_alt(examination),
            elem_id="reliability",
            **PICTURE,
        )
        options = {"show_progress": "minimal", "trigger_mode": "always_last", "concurrency_id": "picture"}
        # "multiple": a delayed event of this kind would carry the first click's cell.
        cell = options | {"trigger_mode": "multiple", "api_visibility": "private"}
        table.click(show_cell, None, [label, answer, gallery, said], **cell)
        gr.on([label.input, answer.input], show, [label, answer], [gallery, said], api_name="mistakes", **options)
