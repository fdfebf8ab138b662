"""Train a model: `python train.py --help` lists the options. The same as `palm train`."""

import sys

from palm_pytorch.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
