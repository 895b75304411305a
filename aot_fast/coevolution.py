"""The game (the paper's algorithm box): Attacker n learns to fool Defender n-1; Defender n learns from Attacker n's edits; repeat.

`play` is the whole of it. A phase moves `game.cursor` through `game.advance` and may be left and continued after any step.
"""

from __future__ import annotations

import os
import sys
import time
import traceback

from aot_fast.attacker import flow_grpo, nft
from aot_fast.attacker.counters import counters
from aot_fast.attacker.model import export_attacker
from aot_fast.attacker.old_logp import anchored, by_step
from aot_fast.attacker.rollout import rollout
from aot_fast.config import Config
from aot_fast.curation import attackable, curate, promising, read_curated
from aot_fast.data.sets import Pictures
from aot_fast.defender import dapo
from aot_fast.defender.answers import answerer, likelihood
from aot_fast.defender.groups import collect
from aot_fast.defender.model import export_defender
from aot_fast.defender.old_logp import with_old_logp
from aot_fast.defender.prompts import Prompts
from aot_fast.engine import TooManyBadSteps, close_runtime, on_rank_0, open_runtime
from aot_fast.evaluation.heldout import evaluate, publish
from aot_fast.game import Game, Stopped, backend, judge_of
from aot_fast.run_folder import open_folder, write_exit

EXIT_SIGNAL, EXIT_BAD_STEPS = 143, 70


def play(game: Game) -> None:
    """Warm the Defender up, then rounds of: train the Attacker, let it write a curated set, train the Defender on it, evaluate."""
    for cursor in game.phases():
        with game.spans(cursor.phase):
            match cursor.phase:
                case "warmup":
                    train_defender(game, game.train.examples())
                case "attack":
                    train_attacker(game, promising(game, attackable(game)))
                case "curate":
                    curate(game)
                case "defend":
                    train_defender(game, read_curated(game))
                case "evaluate":
                    export_players(game)
                    evaluate(game)


def train_attacker(game: Game, questions: Pictures) -> None:
    """Flow-GRPO against the frozen Defender, on questions that it answers rightly on the clean picture and its round trip."""
    config, attacker, defender = game.config, game.attacker, game.defender
    defender.player.offload()
    update = (nft if config.attacker.variant == "nft" else flow_grpo).update
    while (left := config.game.attacker_steps - game.cursor.step) > 0:
        num_steps = min(left, config.attacker.steps_per_rollout)
        drawn = game.stream.draw(config.attacker.prompts_per_step * num_steps, len(questions))
        examples = Pictures([questions.rows[index] for _, index in drawn], questions.split)  # each rank reads its own
        place = {"seed": config.run.seed, "round": game.cursor.round, "step": game.cursor.step}
        with game.spans("attack/rollout"):
            groups = rollout(attacker, examples, **place)
        with game.spans("attack/reward"), defender.whole():  # only now: the two players are never whole at the same time
            scored = flow_grpo.judged(groups, config.reward, answerer(defender), judge_of(game), likelihood(defender))
        with game.spans("attack/update"):
            rows = []
            for part in anchored(attacker, by_step(attacker, scored, num_steps)):
                game.runtime.barrier()  # so that nobody's update is seen to take as long as another's rewards
                start = time.perf_counter()
                metrics = update(attacker, part)  # which waits for the device at its end
                rows.append(metrics | counters(attacker, [one.group for one in part], time.perf_counter() - start, 1 / num_steps))
        game.advance(rows)
    defender.player.reload()


def train_defender(game: Game, examples: Pictures) -> None:
    """DAPO on the pictures of this phase."""
    config, defender = game.config, game.defender
    steps, size = game.steps()[game.cursor.phase], config.defender.prompts_per_step
    reference = game.first_defender() if config.defender.beta and not config.defender.lora.rank else None
    game.attacker.player.offload()
    with Prompts(defender, examples) as prompts:
        while game.cursor.step < steps:
            with game.spans(f"{game.cursor.phase}/rollout"):
                collected = collect(defender, prompts, game.stream, game.stopping)
            game.check_stop()  # a rollout that was cut short is not trained on: it is drawn again when the run continues
            with game.spans(f"{game.cursor.phase}/update"):
                groups, rows = with_old_logp(defender, prompts, collected.groups, game.stream), []
                for first in range(0, config.defender.steps_per_rollout * size, size):
                    if game.cursor.step + len(rows) < steps:
                        rows.append(collected.metrics | dapo.update(defender, prompts, groups[first : first + size], reference))
            game.advance(rows)
    game.attacker.player.reload()


def export_players(game: Game) -> None:
    """Write both players of this round as plain transformers, diffusers or peft folders below `players/`."""
    players, round = game.folder / "players", game.cursor.round
    if round or game.config.game.warmup_steps:
        export_defender(game.defender, players / f"defender_{round}")
    if round and game.config.game.arm == "coevolution":
        export_attacker(game.attacker, players / f"attacker_{round}")


def launch(config: Config, fresh: bool = False) -> int:
    """Play or continue the run of `config` on this process; returns its exit code, which also stands in `exit.json`."""
    runtime = open_runtime(config.engine, config.run)
    folder, finished = on_rank_0(runtime, lambda: open_folder(config, fresh))
    if finished:
        if runtime.rank == 0:
            print(f"{folder} is finished; its report is {folder}/report.html (use --fresh to play again)")
        return 0
    code, reason = 0, "finished"
    try:
        with backend(config):
            game = Game(config, runtime, folder)
            try:
                play(game)
                game.finish()
                publish(game)
            except Stopped as stop:
                game.save()
                code, reason = (EXIT_SIGNAL if game.stop.signal else 0), f"stopped: {stop}; the same command continues"
            finally:
                game.tracker.close()
    except TooManyBadSteps as error:
        code, reason = EXIT_BAD_STEPS, str(error)
    except ValueError as error:  # the user's data or models
        code, reason = 1, str(error)
    except BaseException:
        traceback.print_exc()
        write_exit(folder, runtime.rank, 1, traceback.format_exc(limit=-1))
        raise
    if code == 1 and runtime.rank:  # perhaps this rank alone: its reason must not be lost, nor may it wait for the others
        print(f"aot-fast: rank {runtime.rank}: {reason}", file=sys.stderr, flush=True)
        write_exit(folder, 0, code, f"rank {runtime.rank}: {reason}")
        os._exit(code)
    if runtime.rank == 0:
        print(f"aot-fast: {reason}", file=sys.stderr if code else sys.stdout, flush=True)
        if not code and reason == "finished":
            print(f"report: {folder}/report.html")
    write_exit(folder, runtime.rank, code, reason)
    if code != 1:  # a rank that failed alone must not wait for the others
        close_runtime()
    return code
