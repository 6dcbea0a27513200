"""`internvl train`: reads its arguments and calls `training.run`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

# Modules that load torch are imported by the command that needs them, so that help and errors come at once.


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="internvl train",
        description="train a model as a recipe says; on several devices start it with accelerate launch or torchrun",
        epilog="""examples:
  internvl train internvl3/1b_2nd_lora data.data_paths=[train.jsonl] data.image_folders=[images]
  internvl train my_recipe.yaml training.learning_rate=1e-5 --resume
  torchrun --nproc-per-node 8 -m internvl_hub.app.cli train internvl2_5/8b_2nd_full data.meta_path=meta.json
  internvl train --list""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="?", help="a YAML file, or the name of a bundled recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that win over the recipe's")
    parser.add_argument("--resume", action="store_true", help="continue from the last complete checkpoint, if any")
    parser.add_argument("--dry-run", action="store_true", help="load model and data, say what would happen, and stop")
    parser.add_argument("--list", action="store_true", help="print the names of the bundled recipes")
    return parser


def train_main(argv: Sequence[str]) -> int:
    """Trains; returns 0, 1 after an error that the user can mend, 130 if the run was interrupted and saved.

    One process of several does not return: see `training.run.leave`.
    """
    parser = _parser()
    options = parser.parse_intermixed_args(list(argv))
    if not options.list and options.recipe is None:
        parser.error("name a recipe; --list prints the bundled ones")
    code = _train(options, parser.prog)
    from ..training.run import leave

    leave(code)
    return code


def _train(options: argparse.Namespace, prog: str) -> int:
    from ..training.accounts import TooManySkippedError
    from ..training.recipes import list_recipes, load_recipe
    from ..training.run import InterruptedRunError, describe, prepare, train

    if options.list:
        print("\n".join(list_recipes()))
        return 0
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        if options.dry_run:
            print(describe(prepare(recipe, options.resume)))
        else:
            folder = train(recipe, options.resume)
            if int(os.environ.get("RANK", "0")) == 0:
                print(folder)
    except (ValueError, OSError, ImportError, TooManySkippedError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    except (InterruptedRunError, KeyboardInterrupt) as error:
        print(f"{prog}: {error or 'stopped at once, nothing saved since the last checkpoint'}", file=sys.stderr)
        return 130
    return 0
