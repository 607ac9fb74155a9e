"""Images through JPEG once more: what tutorial_pe_conv_jpeg_twice.json was trained on.

python docs/tutorial/jpeg_twice.py DATASET OUTPUT_FOLDER
"""

import io
import sys
from pathlib import Path

import datasets
import numpy as np
from PIL import Image


def again(image: Image.Image) -> bytes:
    """JPEG at quality 75 with 4:2:0 chroma, the block grid moved by 4 pixels so that it loses anew; kept as PNG."""
    padded = np.pad(np.asarray(image.convert("RGB")), ((4, 12), (4, 12), (0, 0)), mode="edge")
    jpeg, png = io.BytesIO(), io.BytesIO()
    Image.fromarray(padded).save(jpeg, "JPEG", quality=75)
    Image.open(jpeg).crop((4, 4, 36, 36)).save(png, "PNG")
    return png.getvalue()


def main(dataset_name: str, output_folder: str) -> None:
    Path(output_folder, "data").mkdir(parents=True)  # an error if it is there: nothing is overwritten
    for split, rows in datasets.load_dataset(dataset_name).items():
        images = [{"bytes": again(image), "path": None} for image in rows["img"]]
        columns = {"img": images, "label": rows["label"]}
        datasets.Dataset.from_dict(columns, features=rows.features).to_parquet(
            f"{output_folder}/data/{split}-00000-of-00001.parquet"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
