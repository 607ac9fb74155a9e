"""What the page shows, computed without gradio. Letters in shapes as in the model file."""

import io
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2 import functional as F
from transformers import ViTImageProcessor

from ..evaluation.examination import Examination, read_examination
from ..evaluation.records import RecordError
from ..explain.attention import cls_map
from ..explain.overlay import classic_overlay, colour_overlay, denormalize
from ..explain.perturbation import METHODS, Look, hide_patches
from ..explain.pictures import UNITS, Explanation, explain, look_at, name_of, to_pixels
from ..images import ImageError, open_image
from ..modeling_vit_cifar import ViTCifarForImageClassification
from ..models import BUNDLED_MODELS, DEFAULT_MODEL, class_names, load_model, local_folder

PICTURE_SIZE = 256  # pixels at most; the model's own 32 are far too few for a screen
SHOWN_MISTAKES = 12


@dataclass(frozen=True, eq=False)
class Subject:
    """One model of the page.

    Attributes:
        name: what pictures and headings call it.
        examination: of its weights; None if it has not been examined.
    """

    name: str
    model: ViTCifarForImageClassification
    processor: ViTImageProcessor
    examination: Examination | None = None

    @property
    def classes(self) -> list[str]:
        return class_names(self.model.config)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the patches."""
        return (self.model.config.image_size // self.model.config.patch_size,) * 2

    def pixels(self, images: Image.Image | list[Image.Image]) -> torch.Tensor:
        """See `to_pixels`."""
        return to_pixels(self.model, self.processor, images)

    def denormalize(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Normalised (B, 3, H, W) -> 0..1."""
        return denormalize(pixel_values, self.processor.image_mean, self.processor.image_std)

    def look(self, pixel_values: torch.Tensor, class_name: str = "") -> Look:
        """See `look_at`; "" is the page's word for the model's answer."""
        return look_at(self.model, pixel_values, class_name or None)

    def explain(self, seen: Look, method: str, layer: int = 1, head: str = "mean") -> Explanation:
        """One method's map of the one image that was looked at; only `attention` has layers and heads."""
        return explain(seen, self.processor, self.name, method, layer, head)

    def score(self, found: Explanation) -> str:
        """How far this model's examination found that such a map can be trusted; "" of another layer, head or class."""
        examined = {"layer": str(self.model.config.num_hidden_layers), "head": "mean", "class": found.answer}
        others = any(found.description.get(key, value) != value for key, value in examined.items())
        if self.examination is None or others:
            return ""
        numbers = self.examination.record["maps"]["methods"][found.description["method"]]
        passes = numbers.get("passes_random_weights", True)
        score = round(numbers["score"], 2) + 0.0  # + 0.0: not -0.00
        return f"score {score:.2f}" + ("" if passes else ", but alike on random weights")


class FastPNG(Image.Image):
    """Saved as a PNG with little compression: half the time, a sixth of a prediction's, for up to a quarter more bytes.
    gradio calls `save` itself and has no option for it."""

    def save(self, *args: object, **options: object) -> None:
        super().save(*args, **{"compress_level": 1} | options)


def load_subjects(name: str | None) -> list[Subject]:
    """The model of this name; without one, every model of the checkout, the default first.

    Raises:
        ModelError: there is no such model.
    """
    names = [name] if name else [str(path.parent) for path in BUNDLED_MODELS.glob("*/config.json")]
    if not names:
        load_model()  # which says that there is none
    subjects = []
    for name in sorted(names, key=lambda name: (Path(name).name != DEFAULT_MODEL, name)):
        folder = local_folder(name)  # once: a branch may move on, and both are to be of one commit
        model, processor = load_model(str(folder))
        try:
            examination = read_examination(folder)
        except RecordError as error:  # the page is of use without it
            print(error, file=sys.stderr)
            examination = None
        # In bf16 the small changes that occlusion measures would be rounding.
        subjects.append(Subject(name_of(name), model.float(), processor, examination))
    return subjects


def open_upload(upload: dict | None, folder: str) -> Image.Image:
    """The uploaded file as RGB; `upload` is what the browser sends: {"path": ..., ...}.

    Raises:
        ImageError: it is no readable image, or no file that gradio put into `folder`.
    """
    path = Path((upload or {}).get("path") or "")
    if not os.path.isfile(path) or not path.resolve().is_relative_to(Path(folder).resolve()):
        raise ImageError("the upload: expected a file, got none")
    with path.open("rb") as file:
        return open_image(file)


def to_picture(image: torch.Tensor, metadata: dict[str, str] | None = None, times: int | None = None) -> Image.Image:
    """(3, H, W), 0..1 -> an image in which every pixel of the model is a visible square; its PNG carries `metadata`.

    Args:
        times: side of a square; None for as large as PICTURE_SIZE allows.
    """
    picture = F.to_pil_image((image * 255).round().byte())
    times = times or max(1, PICTURE_SIZE // max(picture.size))
    picture = picture.resize((times * picture.width, times * picture.height), Image.Resampling.NEAREST)
    picture.info, picture.__class__ = metadata or {}, FastPNG
    return picture


def probabilities(subject: Subject, logits: torch.Tensor) -> dict[str, float]:
    """(classes,) logits -> class name -> probability."""
    return dict(zip(subject.classes, logits.float().softmax(-1).tolist(), strict=True))


def seen_picture(subject: Subject, pixel_values: torch.Tensor, chances: dict[str, float]) -> Image.Image:
    """The one image of (1, 3, H, W) as the model saw it; its PNG says in its metadata whose answer it is."""
    return to_picture(
        subject.denormalize(pixel_values)[0], {"model": subject.name, "answer": max(chances, key=chances.get)}
    )


def caution(subject: Subject, chances: dict[str, float]) -> str:
    """The plain word beside an answer, as Markdown; stronger below the confidence under which at least
    half were wrong."""
    always = f"It cannot say “none of these”: any picture is forced into one of its {len(chances)} classes."
    highest, examination = max(chances.values()), subject.examination
    # Without an examination, halfway between chance and certainty.
    limit = examination.record["doubtful_below"] if examination else (1 + 1 / len(chances)) / 2
    if highest >= limit:
        return always
    half = ""
    if examination:
        half = f"Of the held-out images that it answered with less than {limit:.0%}, at least half were wrong. "
    return f"**It is not sure: {highest:.0%}.** {half}Perhaps your picture shows none of its classes. {always}"


def overlay(found: Explanation, kind: str = "colour") -> Image.Image:
    """The map over the image, `classic` or `colour`."""
    draw = {"classic": classic_overlay, "colour": colour_overlay}[kind]
    return to_picture(draw(found.map.values.cpu(), found.image[None])[0], found.metadata() | {"overlay": kind})


def caption(subject: Subject, found: Explanation) -> str:
    """What the colours hide, as Markdown: the raw numbers with their unit, and the method's score."""
    method, score = found.description["method"], subject.score(found)
    words = [f"**{score}**"] if score else []
    if method == "occlusion":
        most = found.map.values.abs().max().item()
        words.append(f"no patch changes the probability by more than {100 * most:.3g} percentage points")
    words.append(f"{UNITS[method]}: " + ", ".join(f"{name} {value}" for name, value in found.numbers().items()))
    return "; ".join(words)


def strip(subject: Subject, seen: Look) -> Image.Image:
    """Every head of every layer, and their mean, as one picture: a row for each layer."""
    layers, heads = subject.model.config.num_hidden_layers, subject.model.config.num_attention_heads
    columns = ["mean", *range(heads)]
    maps = [
        cls_map(seen.attentions, layer, head, seen.grid).values.cpu() for layer in range(layers) for head in columns
    ]
    image = subject.denormalize(seen.pixel_values).expand(len(maps), -1, -1, -1)
    cells = [to_picture(cell, times=3) for cell in colour_overlay(torch.cat(maps), image)]
    side, margin, gap = cells[0].width, 24, 4
    size = (margin + len(columns) * (side + gap), margin + layers * (side + gap))
    sheet, font = Image.new("RGB", size, "white"), ImageFont.load_default(20)
    draw = ImageDraw.Draw(sheet)
    for number, cell in enumerate(cells):
        row, column = divmod(number, len(columns))
        sheet.paste(cell, (margin + column * (side + gap), margin + row * (side + gap)))
    for column, name in enumerate(columns):
        label = name if name == "mean" else f"head {name + 1}"
        draw.text((margin + column * (side + gap) + side // 2, margin // 2), label, "black", font, anchor="mm")
    for row in range(layers):
        draw.text((margin // 2, margin + row * (side + gap) + side // 2), str(row + 1), "black", font, anchor="mm")
    sheet.__class__ = FastPNG
    sheet.info = {"model": subject.name, "method": "attention", "layer": f"1 to {layers}", "head": "mean and each"}
    return sheet


@torch.inference_mode()
def hidden(
    subject: Subject, pixel_values: torch.Tensor, patches: Sequence[int]
) -> tuple[dict[str, float], Image.Image, str]:
    """(Probabilities, the picture, one sentence) while the patches with these numbers, row by row, are hidden."""
    patches = sorted(set(patches))
    gone = torch.zeros(1, *subject.grid, dtype=torch.bool)
    gone.view(-1)[patches] = True
    covered = hide_patches(pixel_values, gone.to(pixel_values.device), subject.model.config.patch_size)
    before, after = (
        probabilities(subject, logits) for logits in subject.model(torch.cat([pixel_values, covered])).logits
    )
    return _hidden(subject, covered, patches, before, after)


def nothing_hidden(subject: Subject, seen: Look) -> tuple[dict[str, float], Image.Image, str]:
    """The same for no patches, without asking the model again."""
    chances = probabilities(subject, seen.logits[0])
    return _hidden(subject, seen.pixel_values, [], chances, chances)


def _hidden(
    subject: Subject,
    covered: torch.Tensor,
    patches: list[int],
    before: dict[str, float],
    after: dict[str, float],
) -> tuple[dict[str, float], Image.Image, str]:
    answer, (rows, columns) = max(before, key=before.get), subject.grid
    change = f"**{_as_markdown(answer)}** {before[answer]:.0%} → {after[answer]:.0%}"
    said = f"{len(patches)} of {rows * columns} patches hidden: {change}"
    picture = to_picture(subject.denormalize(covered)[0], {"model": subject.name, "hidden patches": str(patches)})
    return after, picture, said


def _as_markdown(name: str) -> str:
    """A name that Markdown shows as it is, whatever signs it has."""
    return re.sub(r"([!-/:-@[-`{-~])", r"\\\1", name)


def score_words(subject: Subject) -> str:
    """What a score means, as Markdown."""
    if subject.examination is None:
        return f"{subject.name} has not been examined, so its maps have no score."
    return (
        "**Score**: hide the patches that a map finds important, and the answer should go; show them alone, and it "
        f"should come. Mean of {subject.examination.record['maps']['images']} test images, from −1 to 1, for the "
        "model's answer and, of attention, for the last layer's mean; a random order gets about 0, more is better."
    )


def most_important(subject: Subject, pixel_values: torch.Tensor, hidden: Sequence[int]) -> int:
    """The number of the patch, of those not hidden, that gradient rollout puts first for the model's answer."""
    values = METHODS["gradient rollout"](subject.look(pixel_values)).values.flatten()
    values[list(hidden)] = -torch.inf
    return values.argmax().item()


def commonest_mistake(examination: Examination) -> tuple[str, str]:
    """(label, answer)"""
    counts, names = torch.tensor(examination.record["confusion"]).fill_diagonal_(0), examination.record["classes"]
    label, answer = divmod(counts.argmax().item(), len(names))
    return names[label], names[answer]


def confusion_table(examination: Examination) -> str:
    """HTML: a row for each class, a button for each answer, the share of right answers at the end."""
    record = examination.record
    names = [escape(name) for name in record["classes"]]
    head = "".join(f'<th scope="col" title="{name}"><span>{name}</span></th>' for name in names)
    rows = []
    for name, label, counts in zip(names, record["classes"], record["confusion"], strict=True):
        cells = ""
        for answer, count in zip(names, counts, strict=True):
            kind = "right" if answer == name else "wrong"
            scale = 1 if kind == "right" else 8  # mistakes are rare: deeper colour
            share = min(1, scale * count / max(1, sum(counts)))
            what = f"{name} {'answered' if kind == 'right' else 'taken for'} {answer}: {count} of {sum(counts)}"
            cells += (
                f'<td><button class="{kind}" style="--share: {share:.2f}" aria-label="{what}" title="{what}" '
                f'data-label="{name}" data-answer="{answer}">{count}</button></td>'
            )
        right = record["test_accuracy_per_class"].get(label)  # a class may have no test image
        accuracy = "–" if right is None else f"{right:.1%}"
        rows.append(f'<tr><th scope="row" title="{name}">{name}</th>{cells}<td>{accuracy}</td></tr>')
    return (
        f'<div class="scroller"><table class="confusion" style="--classes: {len(names)}"><thead><tr><td></td>{head}'
        f'<th scope="col"><span>accuracy</span></th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def mistakes(subject: Subject, label: str, answer: str) -> tuple[list[tuple[Image.Image, str]], str]:
    """(The images of one class that got one answer, each beside its map for that answer, with a caption; a sentence).

    Of wrong answers the surest come first, of right ones the least sure.
    """
    record, rows = subject.examination.record, subject.examination.answers
    names = record["classes"]
    label_index, answer_index = names.index(label), names.index(answer)
    count = record["confusion"][label_index][answer_index]
    columns = zip(rows["label"], rows["prediction"], rows["confidence"], strict=True)
    wanted = [label_index, answer_index]
    found = [(confidence, row) for row, (*pair, confidence) in enumerate(columns) if pair == wanted]
    found = sorted(found, reverse=label != answer)[:SHOWN_MISTAKES]
    given = "rightly answered" if label == answer else f"answered **{_as_markdown(answer)}**"
    what = f"of class **{_as_markdown(label)}** {given}"
    if not found:
        return [], f"No test image {what}."
    kept = f", {len(found)} of them shown" if count > len(found) else ""
    counted = f"{count} test image{'s' * (count != 1)}"
    said = f"{counted} {what}{kept}: as the model sees each, and under the answer's gradient rollout."
    shown = rows.select([row for _, row in found])
    pixel_values = subject.pixels([image.convert("RGB") for image in shown["image"]])
    seen = subject.look(pixel_values, subject.classes[answer_index])  # the examination may have an older name
    images = subject.denormalize(seen.pixel_values)
    maps = colour_overlay(METHODS["gradient rollout"](seen).values.cpu(), images)
    description = {"model": subject.name, "method": "gradient rollout", "class": answer, "label": label}
    gallery = []
    for (confidence, _), index, beside in zip(found, shown["index"], torch.cat([images, maps], dim=3), strict=True):
        picture = to_picture(beside, description | {"test image": str(index)}, times=4)
        gallery.append((picture, f"{answer} {confidence:.0%}, #{index}"))
    return gallery, said


def reliability_picture(subject: Subject) -> Image.Image:
    """The reliability diagram (Guo et al. 2017, figure 1)."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="0.5", linestyle=":", label="right as often as it says")
    for name, found in subject.examination.record["calibration"].items():
        points = found["reliability"]
        at = [p["confidence"] for p in points], [p["accuracy"] for p in points]
        axes.plot(*at, label=name)
        most = max(p["images"] for p in points)
        axes.scatter(*at, [4 + 150 * p["images"] / most for p in points], zorder=3, clip_on=False)
    axes.set(xlabel="probability that it gives its answer", ylabel="share of right answers", xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"model": subject.name, "shows": "reliability"})
    return Image.open(buffer)


def reliability_alt(examination: Examination) -> str:
    """The diagram for those who do not see it."""
    points = examination.record["calibration"]["as trained"]["reliability"]
    found = ", ".join(f"{p['accuracy']:.0%} of {p['images']:,} at {p['confidence']:.0%}" for p in points)
    return f"Share of right answers, of how many, against the probability that the model gives them: {found}"
