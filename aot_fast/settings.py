"""From a YAML file and dotted overrides to a checked `Config`; imports no torch.

Every error is a `SettingsError` with field, value, rule and fix; the command line turns it into exit code 2.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from aot_fast.config import WORLD_VALIDATION, Config

CONFIGS = Path(__file__).parent / "configs"


class SettingsError(ValueError):
    """A setting that cannot be used."""


def load(name: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration `name` (of aot_fast/configs, or a YAML path) with overrides `--section.field value`.

    Raises SettingsError for an unknown key, a wrong type or an impossible combination.
    """
    path = find(name)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader) or {}
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise SettingsError(f"{path}: must be a mapping of sections ({', '.join(sections())})")
    if "name" not in (tree.get("run") or {}):
        tree["run"] = {**(tree.get("run") or {}), "name": path.stem}
    for key, value in parse_overrides(overrides):
        put(tree, key, value)
    return from_tree(tree, str(path))


def find(name: str) -> Path:
    """The file of a named configuration, or the path itself."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONFIGS / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in CONFIGS.glob("*.yaml"))
        raise SettingsError(f"CONFIG: {name!r} is neither a YAML file nor one of {', '.join(known)}{nearest(name, known)}")
    return path


def parse_overrides(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of `--section.field value` and `--section.field=value`; values are YAML."""
    words = list(words)
    while words:
        word = words.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key:
            raise SettingsError(f"{word!r}: expected --section.field VALUE")
        if not equals:
            if not words or (words[0].startswith("--") and "." in words[0]):
                raise SettingsError(f"--{key}: its value is missing; write --{key} VALUE")
            value = words.pop(0)
        try:
            parsed = yaml.load(value, Loader)
        except yaml.YAMLError:
            parsed = value
        yield key, number("" if value == "" else parsed)


class Loader(yaml.SafeLoader):
    """With YAML 1.2's booleans: `off` is a word, as `reward.judge` has it."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:bool"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text; people mean the number."""
    if isinstance(value, str):
        try:
            return float(value) if any(c.isdigit() for c in value) and "e" in value.lower() else value
        except ValueError:
            return value
    return [number(v) for v in value] if isinstance(value, list) else value


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        node = tree.setdefault(parent, {})
        if not isinstance(node, dict):
            raise SettingsError(f"--{key}: {parent} is no section")
        tree = node
    tree[leaf] = value


def sections() -> list[str]:
    return [f.name for f in dataclasses.fields(Config)]


def known_keys(cls: type = Config, prefix: str = "") -> list[str]:
    """All dotted keys, sections included."""
    keys = []
    for field in dataclasses.fields(cls):
        keys.append(prefix + field.name)
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if dataclasses.is_dataclass(default):
            keys += known_keys(type(default), f"{prefix}{field.name}.")
    return keys


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")


def nearest(key: str, known: Sequence[str]) -> str:
    leaf = key.rpartition(".")[2]
    same_leaf = [k for k in known if k.endswith(f".{leaf}") and k.split(".")[0] == key.split(".")[0]]
    match = same_leaf or difflib.get_close_matches(key, known, 1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def from_tree(tree: dict[str, Any], source: str) -> Config:
    """The checked `Config` of nested dictionaries."""
    known = known_keys()
    for key, value in flatten(tree):
        if key not in known:
            raise SettingsError(f"{source}: {key} = {value!r}: no such setting{nearest(key, known)}")
        if any(k.startswith(f"{key}.") for k in known) and not isinstance(value, dict):
            raise SettingsError(f"{source}: {key} = {value!r}: is a section; set one of its fields, as in --{key}.FIELD VALUE")
    tree = {key: value for key, value in tree.items() if value is not None}
    parser = ArgumentParser(exit_on_error=False)
    for field in dataclasses.fields(Config):
        default = field.default_factory()
        parser.add_argument(f"--{field.name}", type=type(default), default=default)
    try:
        parsed = parser.instantiate(parser.parse_object(_numbers(tree)))
    except Exception as error:  # argparse's and jsonargparse's own kinds
        text = " ".join(str(error).replace("Parser key", "setting").split())
        raise SettingsError(f"{source}: {text}") from None
    config = Config(**{name: getattr(parsed, name) for name in sections()})
    check(config, source)
    return config


def _numbers(tree: Any) -> Any:
    return {key: _numbers(value) for key, value in tree.items()} if isinstance(tree, dict) else number(tree)


def check(config: Config, source: str = "configuration") -> None:
    """The rules between fields. Raises SettingsError for the first broken one."""
    for field, value, rule, fix in _broken(config):
        raise SettingsError(f"{source}: {field} = {value!r}: {rule}; {fix}")


def _broken(c: Config) -> Iterator[tuple[str, Any, str, str]]:
    """(field, value, rule, fix) of what does not hold."""
    yield from _ranges(c)
    a, d = c.attacker, c.defender
    lo, hi = a.window_range
    recorded = a.dynamics != "ode" or a.variant == "nft"
    if recorded and not 0 <= lo < hi <= a.num_steps - 1:
        yield (
            "attacker.window_range",
            a.window_range,
            f"0 <= lo < hi <= num_steps - 1 = {a.num_steps - 1} (the last step has no noise)",
            "lower hi",
        )
    if recorded and not 1 <= a.window <= hi - lo:
        yield "attacker.window", a.window, f"the window must fit into window_range, {hi - lo} steps", "lower it or widen window_range"
    if a.variant == "nft" and (a.dynamics != "ode" or a.beta > 0):
        field, value = ("attacker.beta", a.beta) if a.dynamics == "ode" else ("attacker.dynamics", a.dynamics)
        yield field, value, "variant nft has no stochastic steps and no KL", "use dynamics ode and beta 0"
    if a.dynamics == "ode" and a.variant != "nft" and c.game.arm == "coevolution" and c.game.rounds and c.game.attacker_steps:
        yield "attacker.dynamics", a.dynamics, "ode has no log-prob to train on", "use flow_sde, dance or cps, or variant nft"
    if a.beta > 0 and not a.lora.rank:
        yield (
            "attacker.beta",
            a.beta,
            "the KL reference is the base under a switched-off LoRA adapter",
            "set attacker.lora.rank > 0 or beta 0",
        )
    if a.compile_blocks and a.gather != "update":
        rule = f"with gather {a.gather} ZeRO's hooks run inside a block and cannot be compiled"
        yield "attacker.compile_blocks", True, rule, "use gather update"
    if a.compile_blocks and c.engine.offload == "all":
        yield "attacker.compile_blocks", True, "with engine.offload all ZeRO's hooks bring every module's weights", "use offload optimizer"
    if a.variant == "nft" and a.steps_per_rollout > 1:
        yield "attacker.steps_per_rollout", a.steps_per_rollout, "nft's loss holds for the weights that sampled", "use 1"
    if a.context_pixels and a.region == "whole":
        rule, fix = "the whole picture is what is edited: there is no context beside it", "use 0, or attacker.region window"
        yield "attacker.context_pixels", a.context_pixels, rule, fix
    if a.probe_edits == 1:
        yield "attacker.probe_edits", 1, "one edit has no spread of rewards", "use 0 or at least 2"
    if a.probe_edits and not a.probe_share:
        yield "attacker.probe_share", a.probe_share, "must be more than 0: nothing would be left to train on", "raise it"
    if c.reward.q_low >= c.reward.q_high:
        yield "reward.q_low", c.reward.q_low, f"must be below reward.q_high = {c.reward.q_high}", "lower it"
    if c.reward.efficacy == "consecutive" and c.reward.consecutive > c.reward.trials:
        yield "reward.consecutive", c.reward.consecutive, f"cannot be more than reward.trials = {c.reward.trials}", "raise trials"
    if c.reward.judge_model and c.reward.judge != "defender":
        yield (
            "reward.judge_model",
            c.reward.judge_model,
            f"nobody counts with judge {c.reward.judge}",
            "use judge defender, or leave it empty",
        )
    if c.reward.judge_answers and not (c.reward.judge == "defender" and c.reward.judge_model):
        judge = "the first Defender would forbid exactly the edits that fool it"
        yield (
            "reward.judge_answers",
            c.reward.judge_answers,
            judge if c.reward.judge == "defender" else f"nobody is asked with judge {c.reward.judge}",
            "name another model as reward.judge_model, or set it to false",
        )
    others = c.data.train != "world" and not d.model.startswith("asset:")
    if others and c.reward.judge_model.startswith("asset:"):
        yield (
            "reward.judge_model",
            c.reward.judge_model,
            "a bundled judge knows nothing but the small world",
            "name yours, or leave it empty",
        )
    if d.importance_cap and d.old_logp != "recompute":
        rule = "the weight compares the trainer's log-prob with the sampler's, and the trainer's is not recorded"
        yield "defender.importance_cap", d.importance_cap, rule, "set defender.old_logp recompute, or 0"
    if d.group_size < 2:
        yield "defender.group_size", d.group_size, "a group of one has no advantage", "use at least 2"
    if any(name.endswith("lm_head") for name in d.lora.targets) and c.kernels.backend != "reference":
        fix = "leave it out, or set kernels.backend reference"
        yield "defender.lora.targets", list(d.lora.targets), "lm_head ends in the loss itself and takes no adapter", fix
    if d.overlong_buffer >= d.max_response_tokens:
        yield "defender.overlong_buffer", d.overlong_buffer, f"must be below max_response_tokens = {d.max_response_tokens}", "lower it"
    if c.curation.clean_share + c.curation.replay_share >= 1:
        yield "curation.clean_share", c.curation.clean_share, "clean_share + replay_share must be below 1", "lower one of them"
    if c.data.train != "world" and not c.data.train.endswith(".jsonl"):
        yield "data.train", c.data.train, "must be `world` or a .jsonl file", "give the path of a JSONL file of questions"
    yield from _heldout(c)
    if Path(c.run.name).name != c.run.name or c.run.name in ("", ".", ".."):
        yield "run.name", c.run.name, "must be a plain folder name", "use run.folder for the path"


def _heldout(c: Config) -> Iterator[tuple[str, Any, str, str]]:
    heldout, of_world = c.data.heldout, c.data.train == "world"
    if of_world and heldout not in ("", WORLD_VALIDATION):
        fix = f"did you mean {WORLD_VALIDATION!r}?" if heldout.startswith("w") else "leave it empty, or set data.train to a .jsonl file"
        yield "data.heldout", heldout, f"must be empty or {WORLD_VALIDATION} where data.train is `world`", fix
    if not of_world and heldout and not heldout.endswith(".jsonl"):
        fix = "leave it empty to hold out a share of data.train"
        yield "data.heldout", heldout, "must be empty or a .jsonl file where data.train is one", fix


POSITIVE = (
    "engine.timeout_s engine.max_bad_steps defender.temperature defender.top_p "
    "data.world_size data.max_image_pixels defender.group_size defender.prompts_per_step "
    "defender.steps_per_rollout defender.max_generation_batches defender.rollout_batch defender.microbatch defender.head_chunk_rows "
    "defender.tokens_per_microbatch defender.prefetch_bytes "
    "defender.max_prompt_tokens defender.max_response_tokens defender.optimizer.lr "
    "attacker.optimizer.lr attacker.num_steps attacker.group_size attacker.prompts_per_step attacker.rollout_batch "
    "attacker.steps_per_rollout attacker.microbatch attacker.decode_batch attacker.window_stays attacker.target_pixels "
    "attacker.reference_pixels attacker.condition_pixels attacker.guidance reward.trials reward.efficacy_temperature "
    "curation.num_questions curation.edits_per_question checkpoint.every checkpoint.keep metrics.every"
).split()
UNIT = (
    "defender.top_p attacker.ema_decay attacker.probe_share curation.clean_share curation.replay_share curation.hard_share "
    "data.max_bad_fraction data.heldout_fraction"
).split()
NOT_NEGATIVE = (
    "data.num_train data.num_heldout defender.beta defender.entropy_coef attacker.eta attacker.beta attacker.clip "
    "game.warmup_steps game.rounds game.attacker_steps game.defender_steps run.stop_after run.threads reward.pad reward.temperature "
    "evaluation.num_questions evaluation.num_attacked defender.max_staleness reward.solvable_trials "
    "curation.num_pictures attacker.probe_edits defender.vision_lr defender.prefetch_workers defender.importance_cap "
    "defender.lora.rank attacker.lora.rank attacker.tokens_per_microbatch attacker.feather attacker.encoding_bytes "
    "attacker.context_pixels attacker.tail_steps"
).split()


def _ranges(config: Config) -> Iterator[tuple[str, Any, str, str]]:
    for names, holds, rule in (
        (POSITIVE, lambda x: x > 0, "must be positive"),
        (UNIT, lambda x: 0 <= x <= 1, "must lie in [0, 1]"),
        (NOT_NEGATIVE, lambda x: x >= 0, "must not be negative"),
    ):
        for name in names:
            value = get(config, name)
            if not holds(value):
                yield name, value, rule, "correct it"


def get(config: Any, key: str) -> Any:
    """The value at a dotted key."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


def to_yaml(config: Config) -> str:
    """The resolved configuration, as saved in the run folder; `load` reads it back."""
    return yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config))), sort_keys=False)


IGNORED = ("run.stop_after", "run.threads", "metrics", "checkpoint", "engine.timeout_s")
"""Settings that do not change what a run computes; a run may continue with other values."""


def differences(a: Config, b: Config) -> list[str]:
    """`field: old -> new` of the settings that make a run another run."""
    old, new = (dict(flatten(json.loads(json.dumps(dataclasses.asdict(c))))) for c in (a, b))
    leaves = [k for k in old if not isinstance(old[k], dict) and not k.startswith(IGNORED)]
    return [f"{k}: {old[k]!r} -> {new[k]!r}" for k in leaves if old[k] != new[k]]


def config_hash(config: Config) -> str:
    """Hash of the settings that make a run."""
    tree = dict(flatten(json.loads(json.dumps(dataclasses.asdict(config)))))
    text = json.dumps({k: v for k, v in tree.items() if not isinstance(v, dict) and not k.startswith(IGNORED)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
