"""Quality on a data set of one's own: this package's detector against torchvision's Faster R-CNN-FPN.

    python -m benchmarks.quality train-peer --data DIR --val DIR --output DIR --images N [--time-limit MINUTES]

``train-peer`` trains the peer (see ``faster_rcnn.py``) on N images, augmented copies counted each; the same command
continues a run that was stopped. Ours is trained by ``python -m sparse_rcnn.train``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from benchmarks.faster_rcnn import PeerTrainer

# Those of sparse_rcnn.train: shorter sides from 0.6 to 1 of the test size.
_MIN_SIZE, _MAX_SIZE = 320, 448
_TRAIN_MIN_SIZES = [round(size * _MIN_SIZE / 800) for size in range(480, 801, 32)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 3 when a run was stopped before its end."""
    options = build_parser().parse_args(arguments)
    return options.run(options)


def build_parser() -> argparse.ArgumentParser:
    """The commands and their flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    peer = commands.add_parser("train-peer", help="train torchvision's Faster R-CNN-FPN")
    peer.set_defaults(run=train_peer)
    peer.add_argument("--data", required=True, help="data set to train on")
    peer.add_argument("--val", required=True, help="data set to evaluate on")
    peer.add_argument("--output", required=True, help="folder for checkpoints and the log; a run in it is continued")
    peer.add_argument("--images", type=int, required=True, help="images to train on, an image counted each time")
    peer.add_argument("--batch-size", type=int, default=4)
    peer.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd")
    peer.add_argument("--lr", type=float, default=0.01)
    peer.add_argument("--channels", type=int, default=128, help="of the FPN (default 128)")
    peer.add_argument("--augment", choices=("paper", "small"), default="paper", help="as of sparse_rcnn.train")
    peer.add_argument("--min-sizes", type=int, nargs="+", default=_TRAIN_MIN_SIZES, help="as of sparse_rcnn.train")
    peer.add_argument("--max-size", type=int, default=_MAX_SIZE, help="as of sparse_rcnn.train")
    peer.add_argument("--group-shapes", action="store_true", help="as of sparse_rcnn.train")
    peer.add_argument("--cache-mb", type=int, default=0, help="as of sparse_rcnn.train")
    peer.add_argument("--seed", type=int, default=0)
    peer.add_argument("--time-limit", type=float, help="minutes after which to stop with a checkpoint")
    peer.add_argument("--eval-every", type=int, default=500, help="steps")
    peer.add_argument("--checkpoint-every", type=int, default=100, help="steps")
    peer.add_argument("--log-every", type=int, default=25, help="steps")
    return parser


def train_peer(options: argparse.Namespace) -> int:
    """Train until all images were seen or the time is over."""
    torch.set_num_threads(2)
    settings = {name: getattr(options, name) for name in ("images", "batch_size", "lr", "optimizer", "channels")}
    settings |= {name: getattr(options, name) for name in ("augment", "group_shapes", "seed")}
    settings |= {
        "min_size": _MIN_SIZE,
        "max_size": _MAX_SIZE,
        "train_min_sizes": options.min_sizes,
        "train_max_size": options.max_size,
    }
    trainer = PeerTrainer(options.data, options.val, options.output, settings, options.cache_mb)
    done = trainer.run(options.time_limit, options.eval_every, options.checkpoint_every, options.log_every)
    return 0 if done else 3


if __name__ == "__main__":
    sys.exit(main())
