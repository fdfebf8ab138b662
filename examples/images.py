"""Teaches a Perceiver AR to draw: it is given a shape, place and size, and the picture comes pixel by pixel.

    python examples/images.py make shapes.npy
    python train.py --model perceiver-ar --data shapes.npy --num-tokens 32 --seq-len 260 \\
        --cross-attn-seq-len 4 --dim 128 --batch-size 8 --steps 2000 --out runs/shapes
    python examples/images.py draw runs/shapes/model shapes.png

A sequence is what is to be drawn (kind, x, y, size) and then 16 x 16 pixels of 8 greys, as integers below 32.
The first four tokens of a row are the prefix, from which nothing is predicted, so that every pixel is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from palm_pytorch import PerceiverAR

SIDE = 16
GREYS = 8
KINDS = ("disc", "ring", "bar", "cross")


def sequence(kind: int, x: int, y: int, size: int) -> np.ndarray:
    """What is to be drawn and its picture, `(4 + SIDE * SIDE,)`. Edges are soft: greys between the two."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    distance = np.hypot(columns - x, rows - y)
    inside = {
        "disc": size - distance,
        "ring": 1.2 - abs(distance - size),
        "bar": np.minimum(1.5 - abs(columns - x), size + 1 - abs(rows - y)),
        "cross": np.maximum(
            np.minimum(0.8 - abs(columns - x), size - abs(rows - y)),
            np.minimum(0.8 - abs(rows - y), size - abs(columns - x)),
        ),
    }[KINDS[kind]]
    greys = np.clip((inside + 0.5) * GREYS, 0, GREYS - 1).astype(np.uint8)
    return np.concatenate([np.array([kind, x, y, size], np.uint8), greys.ravel()])


def wishes(draw: np.random.Generator, count: int) -> np.ndarray:
    """What is to be drawn, `(count, 4)`: kind, x, y, size."""
    return draw.integers([0, 4, 4, 2], [len(KINDS), SIDE - 4, SIDE - 4, 6], (count, 4))


def make(options: argparse.Namespace) -> None:
    """Write the pictures of `options.count` wishes."""
    pictures = np.stack(
        [sequence(*wish) for wish in wishes(np.random.default_rng(0), options.count).tolist()]
    )
    np.save(options.file, pictures)
    print(f"{options.file}: {len(pictures):,} sequences of {pictures.shape[1]}")


def draw(options: argparse.Namespace) -> None:
    """Have the model draw wishes, and show them in the upper row, what was meant in the lower one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    try:
        model = PerceiverAR.from_pretrained(options.model)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{options.model}: no trained model: {error}") from error
    wished = wishes(np.random.default_rng(options.seed), 8)
    meant = np.stack([sequence(*wish) for wish in wished.tolist()])[:, 4:]
    begin = np.full((len(wished), 1), model.config["num_tokens"] - 1)  # the token that begins a sequence
    prompt = torch.from_numpy(np.concatenate([begin, wished], axis=1))
    generator = torch.Generator().manual_seed(options.seed)
    drawn = model.generate(prompt, SIDE * SIDE, temperature=0.5, generator=generator).numpy()
    either, both = (drawn > 0) | (meant > 0), (drawn > 0) & (meant > 0)
    print(f"of the pixels that are not black in one of the two, {both.sum() / either.sum():.0%} are in both")
    figure, axes = pyplot.subplots(2, len(wished), figsize=(len(wished), 2.3), layout="constrained")
    for row, pictures in zip(axes, (drawn, meant), strict=True):
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture.reshape(SIDE, SIDE), cmap="gray", vmin=0, vmax=GREYS - 1)
            axis.axis("off")
    figure.savefig(options.file, dpi=100)
    print(options.file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")
    maker = verbs.add_parser("make", help="write pictures to train on")
    maker.set_defaults(run=make)
    maker.add_argument("file", type=Path, help="a new .npy file")
    maker.add_argument("--count", type=int, default=5000, help="of pictures (default: 5000)")
    drawer = verbs.add_parser("draw", help="draw with a trained model")
    drawer.set_defaults(run=draw)
    drawer.add_argument("model", type=Path, help="a folder of save_pretrained, as RUN/model")
    drawer.add_argument("file", type=Path, help="of the picture, as shapes.png")
    drawer.add_argument("--seed", type=int, default=1, help="decides what is drawn (default: 1)")
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
