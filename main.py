"""Pretrain a language model from a YAML file.

python main.py yamls/demo/hydra.yaml
composer -n 8 main.py yamls/pretrain/hydra.yaml optimizer.lr=5e-4 run_name=mine
python main.py yamls/pretrain/hydra.yaml --dry-run
"""

import argparse
import sys

from anymixer.config import load_config
from anymixer.entry_point import ArgumentParser, run
from anymixer.training import check_tables


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """FILE, `key.sub=value` overrides and options, in any order."""
    parser = ArgumentParser(prog="main.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE.yaml", help="the run's configuration")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.sub=value", help="keys to set on top of the file"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print configuration, parameters and token budget, and stop"
    )
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str]) -> None:
    """Load and check the configuration, then describe or train it."""
    options = parse_arguments(arguments)
    config = load_config(options.file, options.overrides, checks=[check_tables])
    if options.dry_run:
        from anymixer.describe import print_dry_run

        print_dry_run(config)
    else:
        from anymixer.pretrain import pretrain

        pretrain(config)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
