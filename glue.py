"""Finetune a pretrained checkpoint on GLUE and score it, from a YAML file.

python glue.py yamls/finetune/hydra.yaml
python glue.py yamls/finetune/hydra.yaml starting_checkpoint_load_path=runs/mine tasks.mnli=false sweep.lr=[1e-5,5e-5]
python glue.py yamls/finetune/hydra.yaml --dry-run
python glue.py yamls/finetune/hydra.yaml --report

Started again, the same command runs only the jobs that have no result yet.
"""

import argparse
import sys

from anymixer.config import GlueConfig, load_config
from anymixer.entry_point import ArgumentParser, run


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """FILE, `key.sub=value` overrides and options, in any order."""
    parser = ArgumentParser(prog="glue.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE.yaml", help="the run's configuration")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.sub=value", help="keys to set on top of the file"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print the jobs and what each starts from, and stop")
    what.add_argument("--report", action="store_true", help="rebuild the report from the results on disk, and stop")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str]) -> None:
    """Load and check the configuration, then run, describe or report it."""
    options = parse_arguments(arguments)
    config = load_config(options.file, options.overrides, schema=GlueConfig)
    from anymixer import finetune

    if options.dry_run:
        finetune.print_graph(config)
    elif options.report:
        finetune.report(config)
    else:
        finetune.finetune(config)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
