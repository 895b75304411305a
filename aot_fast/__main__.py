"""The command line: `aot-fast run | report | bootstrap | doctor`, and `torchrun ... -m aot_fast run CONFIG` on several processes.

torch is imported only after the arguments and the configuration have been checked.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

EXIT_SETTINGS = 2
RUN_HELP = """
CONFIG is a name in aot_fast/configs (tiny, tiny_study, single_gpu, paper_8gpu) or the path of a YAML file. Any setting of
aot_fast/config.py can be given as --section.field VALUE, for example:

  torchrun --nproc_per_node 2 -m aot_fast run tiny --run.name try --defender.optimizer.lr 1e-5
  aot-fast run tiny --data.train questions.jsonl --data.images photos/

A run lives in runs/NAME. The same command continues one that was stopped; --fresh moves it aside and begins anew.

With --seeds or --arms the command plays one run for each arm and seed, some at a time, and compares them in runs/NAME:

  aot-fast run tiny_study --seeds 0,1,2 --arms coevolution,clean,roundtrip,random_edit
"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="aot-fast", description="Adversarial opponent training of vision-language models.", allow_abbrev=False
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    raw = argparse.RawDescriptionHelpFormatter
    run = commands.add_parser("run", help="play the game", epilog=RUN_HELP, formatter_class=raw, allow_abbrev=False)
    run.add_argument("config", metavar="CONFIG")
    run.add_argument("--fresh", action="store_true", help="move an existing run of this name aside and begin anew")
    run.add_argument("--dry-run", action="store_true", help="check and print the resolved settings, or the runs of a study, then end")
    run.add_argument("--seeds", metavar="K,K,...", help="play a run for each seed")
    run.add_argument("--arms", metavar="ARM,...", help="play a run for each arm: coevolution, clean, roundtrip, random_edit")
    run.add_argument("--jobs", metavar="N", help="runs at a time, with --seeds or --arms (default: one a GPU, 2 on a CPU)")
    report = commands.add_parser(
        "report", help="write report.html and summary.json of a run or a study, finished or not", allow_abbrev=False
    )
    report.add_argument("folder", type=Path, metavar="RUN_FOLDER")
    bootstrap = commands.add_parser("bootstrap", help="train the small players from scratch", allow_abbrev=False)
    bootstrap.add_argument("name", choices=["tiny"])
    bootstrap.add_argument("--out", type=Path, default=Path("runs/bootstrap"), help="working folder; the players are written below it")
    bootstrap.add_argument("--seed", type=int, default=0)
    doctor = commands.add_parser("doctor", help="what this machine has, and whether the bundled players work", allow_abbrev=False)
    doctor.add_argument("--config", default="tiny", help="configuration whose models and settings are looked at")
    return top


def main(words: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 well, 2 wrong settings, 143 stopped by a signal, 1 anything else."""
    top = parser()
    known, rest = top.parse_known_args(words)
    if rest and known.command != "run":
        top.error(f"unknown arguments: {' '.join(rest)}")
    from aot_fast.settings import SettingsError

    try:
        return COMMANDS[known.command](known, rest)
    except SettingsError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"aot-fast: {error}", file=sys.stderr)
        return EXIT_SETTINGS
    except ValueError as error:  # the user's data or models: said without a traceback
        print(f"aot-fast: {error}", file=sys.stderr)
        return 1


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    from aot_fast.settings import SettingsError, load, to_yaml

    if (args.seeds, args.arms, args.jobs) != (None, None, None):
        return study(args, overrides)
    config = load(args.config, overrides)
    from aot_fast.study.plan import STUDY

    folder = Path(config.run.folder) / config.run.name
    if (folder / STUDY).is_file():
        raise SettingsError(f"{folder} holds a study; give --seeds or --arms to continue it, or another --run.name to play a single run")
    if args.dry_run:
        print(to_yaml(config), end="")
        return 0
    quiet()
    from aot_fast.coevolution import launch

    return launch(config, fresh=args.fresh)


def study(args: argparse.Namespace, overrides: list[str]) -> int:
    from aot_fast.settings import load
    from aot_fast.study import plan, play

    play.refuse_torchrun()
    arms, seeds, jobs = plan.parse_flags(args.arms, args.seeds, args.jobs)
    plan.refuse_own_settings(overrides)
    config = load(args.config, overrides)
    if args.fresh and not args.dry_run:
        plan.move_aside(config)
    runs = plan.planned(config, arms or (config.game.arm,), seeds or (config.run.seed,))
    commands = {run.name: [*play.COMMAND, args.config, *overrides, *run.words()] for run in runs.runs()}
    if args.dry_run:
        for run in runs.runs():
            print(f"{run.name}: {run.state}\n  {shlex.join(commands[run.name])}")
        return 0
    quiet()
    return play.run_study(runs, commands, jobs)


def report(args: argparse.Namespace, _: list[str]) -> int:
    from aot_fast.settings import SettingsError, load
    from aot_fast.study.plan import STUDY

    if (args.folder / STUDY).is_file():
        from aot_fast.study.summary import publish_study

        return 0 if publish_study(args.folder, say=True) else 1
    if not (args.folder / "config.yaml").is_file():
        raise SettingsError(f"RUN_FOLDER = {str(args.folder)!r}: holds no config.yaml; give the folder of a run, such as runs/tiny")
    from aot_fast.evaluation.summary import summarise
    from aot_fast.report import build_report

    summarise(args.folder, load(str(args.folder / "config.yaml")))
    print(build_report(args.folder))
    return 0


def bootstrap(args: argparse.Namespace, _: list[str]) -> int:
    quiet()
    from aot_fast.bootstrap.run import bootstrap as train_players

    train_players(args.out, args.seed)
    return 0


def doctor(args: argparse.Namespace, _: list[str]) -> int:
    from aot_fast.settings import load

    config = load(args.config)
    quiet()
    from aot_fast.doctor import examine

    return examine(config)


def quiet() -> None:
    """Keep the libraries' own progress bars and notices out of the log; `AOT_FAST_VERBOSE=1` lets them through."""
    if os.environ.get("AOT_FAST_VERBOSE"):
        return
    import logging
    import warnings

    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", module="aot_fast")  # our own say what was quarantined or left unjudged
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)


COMMANDS = {"run": run, "report": report, "bootstrap": bootstrap, "doctor": doctor}

if __name__ == "__main__":
    sys.exit(main())
