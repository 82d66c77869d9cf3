"""Writes the fixtures from a checkpoint: python make_fixtures.py --models DIR --fixtures DIR

    --out ROOT             both the bundled checkpoint (ROOT/assets/nexus-random) and its fixtures (ROOT/tests/fixtures)
    --models DIR --seed N  with --fresh: writes another checkpoint into DIR first
In: a checkpoint folder of make_checkpoint.py.  Out: the files README.md lists.
"""
import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

import fixtures_data
import fixtures_generation
import fixtures_networks
import fixtures_training
import make_checkpoint
from fixture_files import Fixtures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--models")
    parser.add_argument("--fixtures")
    parser.add_argument("--fresh", action="store_true", help="write the checkpoint before the fixtures")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(arguments.out) if arguments.out else None
    models = Path(arguments.models or root / "assets" / "nexus-random")
    fixtures = arguments.fixtures or (root and root / "tests" / "fixtures")
    if root or arguments.fresh:
        make_checkpoint.make(models, arguments.seed)
    if fixtures:
        made = Fixtures(fixtures, models, "python lab/parity/make_fixtures.py --models <checkpoint> --fixtures <folder>")
        for part in (fixtures_data, fixtures_networks, fixtures_generation, fixtures_training):
            part.write(made)


if __name__ == "__main__":
    main()
