"""The specification of a study: its arms, its seeds and what all its runs share; presets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from star import config as configuration
from star import files
from star.config import EMBEDDED, Config, ConfigError
from star.presets import preset as run_preset


@dataclass
class Study:
    """Arms x seeds. A run is the configuration `preset`, changed by `changes`, then by its arm, with its seed."""

    preset: str = EMBEDDED
    """The preset of `star train` that every run starts from."""
    baselines: tuple[str, ...] = ("uniform", "shuffled", "random")
    """The arms that all others are compared with. The report counts the images until an arm reaches the final score
    of the first one."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """A seed decides prompts, noise and adapters; runs of one seed share all of these."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Changes of every run, nested as in a configuration file."""
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The changes of each arm by its name, nested as in a configuration file."""
    prompts: tuple[str, ...] = ()
    """Prompts that all runs are trained and scored on. Empty: the train and held-out prompts of the task."""

    def config(self, arm: str, seed: int, out: Path) -> Config:
        """The configuration of one run of the study in the folder `out`."""
        config = configuration.update(run_preset(self.preset), self.changes)
        config = configuration.update(config, self.arms[arm], f"arms.{arm}.")
        if self.prompts:
            path = str(out / "prompts.txt")
            shared = {"sampling": {"prompts": path}, "scoring": {"prompts": path}}
            config = configuration.update(config, shared)
        config = configuration.update(config, {"run": {"seed": seed, "out": str(run_folder(out, arm, seed))}})
        config.check()
        return config

    def check(self) -> None:
        """Raise ConfigError unless every run of the study has a configuration."""
        if not self.baselines or not set(self.baselines) <= set(self.arms):
            raise ConfigError(f"baselines: got {self.baselines}, expected some of the arms {list(self.arms)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds: got {self.seeds}, expected different ones, at least one")
        scored = scored_by(self.config(self.baselines[0], self.seeds[0], Path()))
        for arm in self.arms:
            if not arm.replace("_", "").isalnum():
                raise ConfigError(f"arms: got the name {arm!r}, expected letters, digits and '_'")
            config = self.config(arm, self.seeds[0], Path())
            if not config.scoring.every or not config.scoring.count:
                got = f"{config.scoring.every} and {config.scoring.count}"
                raise ConfigError(f"scoring.every, scoring.count: got {got}, expected both above 0 in a study")
            for name, value in scored_by(config).items():
                if value != scored[name]:
                    raise ConfigError(
                        f"arms.{arm}.{name}: got {value!r}, expected {scored[name]!r} as of {self.baselines[0]}: "
                        "scores are compared image by image"
                    )

    def own_judges(self) -> dict[str, str]:
        """The arms whose held-out images another reward scores than the first baseline's, with that reward."""
        configs = {arm: self.config(arm, self.seeds[0], Path()) for arm in self.arms}
        rewards = {arm: str(config.scoring.reward or config.run.reward) for arm, config in configs.items()}
        return {arm: reward for arm, reward in rewards.items() if reward != rewards[self.baselines[0]]}


def scored_by(config: Config) -> dict[str, Any]:
    """What must be equal for scores of two runs to be paired, by the names of the settings."""
    scoring = configuration.flatten({"scoring": configuration.to_dict(config.scoring)})
    return {"task": config.task, **scoring}


def load_study(path: Path, base: Study | None = None) -> Study:
    """Read a YAML file over a base (default: plain defaults)."""
    return configuration.update_from(base or Study(), configuration.read(path), path)


def save_study(study: Study, path: Path) -> None:
    files.replace_text(path, yaml.safe_dump(configuration.to_dict(study), sort_keys=False))


def run_folder(out: Path, arm: str, seed: int) -> Path:
    """The folder of a run of the study in `out`."""
    return out / "runs" / f"{arm}-{seed}"


def _allocation(strategy: str, **options: Any) -> dict[str, Any]:
    return {"allocation": {"strategy": strategy, **options}}


def shapes() -> Study:
    """The embedded world. The first five arms decide the question; the others say which choice matters."""
    half_rate = {"optimization": {"learning_rate": 1.75e-5}}
    return Study(
        changes={
            # Checkpoints and scores at the same iterations; the norm of the updates is measured, not changed. The
            # learning rate is the one at which the scalar arm does best; see docs/evidence/method.md.
            "scoring": {"every": 30, "count": 512},
            "run": {"save_every": 30, "keep_checkpoints": 1, "figures": False},
            "optimization": {"update_norm": 0.0, "learning_rate": 3.5e-5},
        },
        arms={
            "uniform": _allocation("uniform"),
            "attention": _allocation("attention"),
            "shuffled": _allocation("shuffled"),
            "random": _allocation("random"),
            "oracle": _allocation("oracle"),
            "inverted": _allocation("inverted"),
            "final_step": _allocation("final_step"),
            "attention_mix_1": _allocation("attention", mix=1.0),
            "random_mix_1": _allocation("random", mix=1.0),
            "oracle_mix_1": _allocation("oracle", mix=1.0),
            # Ratios per location are sqrt(18 * 18) times noisier than those of an image, and so is their clip range.
            "attention_location": _allocation("attention") | {"loss": {"ratio": "location", "clip_range": 0.036}},
            "attention_sample": _allocation("attention") | {"loss": {"ratio": "sample"}},
            # The verifier says what each location earned: a good object is not blamed for a bad one.
            "uniform_credit": _allocation("uniform") | {"loss": {"advantage": "location"}},
            "attention_credit": _allocation("attention") | {"loss": {"advantage": "location"}},
            # The other masks leave out objects that were not requested, though they cost reward.
            "oracle_every_object": _allocation("oracle") | {"run": {"reward": "star.shapes.reward:every_object"}},
            # The scalar arm's best learning rate need not be the others'.
            "uniform_half_rate": _allocation("uniform") | half_rate,
            "attention_half_rate": _allocation("attention") | half_rate,
            "attention_mix_1_half_rate": _allocation("attention", mix=1.0) | half_rate,
            "oracle_half_rate": _allocation("oracle") | half_rate,
        },
    )


def _shapes_with_arms(*arms: str) -> Study:
    """The main study with fewer arms."""
    study = shapes()
    study.arms = {arm: study.arms[arm] for arm in arms}
    return study


def global_attribute() -> Study:
    """Prompts that name nothing but the background: there is no location to favor, so the arms should agree."""
    study = _shapes_with_arms("uniform", "attention", "attention_mix_1", "random_mix_1")
    study.prompts = tuple(f"a {background} background" for background in ("black", "gray", "white"))
    study.changes["sampling"] = {"prompts_per_iteration": 3, "images_per_prompt": 32}
    study.changes["scoring"] |= {"count": 192}
    study.changes["optimization"] |= {"iterations": 120}
    study.baselines = ("uniform",)
    return study


def noise() -> Study:
    """Rewards that are noise: there is nothing to learn, and the scores fall by the harm that each arm's steps do."""
    study = _shapes_with_arms("uniform", "attention", "attention_mix_1", "random_mix_1", "oracle", "oracle_mix_1")
    study.changes["run"] |= {"reward": "star.shapes.reward:noise"}
    study.changes["scoring"] |= {"reward": "star.shapes.reward:shapes_reward"}
    study.changes["optimization"] |= {"iterations": 120}
    study.baselines = ("uniform",)
    return study


def plain() -> Study:
    """Plain gradients with momentum instead of AdamW's steps, all of one norm. AdamW removes what weights gain."""
    study = _shapes_with_arms("uniform", "attention", "shuffled", "final_step", "oracle_every_object")
    # Half the norm of AdamW's updates: the one at which the scalar arm does best; see docs/evidence/method.md.
    study.changes["optimization"] |= {"adam_epsilon": 1.0, "weight_decay": 0.0, "update_norm": 0.0093}
    study.baselines = ("uniform", "shuffled")
    return study


def large_batch() -> Study:
    """Four times the images in a quarter of the updates: less noise in a step, for the same number of images."""
    study = _shapes_with_arms(
        "uniform", "attention", "shuffled", "random", "oracle_every_object", "attention_mix_1", "final_step"
    )
    study.changes["sampling"] = {"prompts_per_iteration": 64}
    study.changes["scoring"] |= {"every": 10}
    study.changes["run"] |= {"save_every": 10}
    # The scalar arm's best learning rate here; the moving average forgets over as large a part of the run.
    study.changes["optimization"] |= {"iterations": 60, "learning_rate": 7e-5, "ema_decay": 0.95}
    return study


def credit() -> Study:
    """Whether knowing the locations helps in DiffusionNFT: what each location or concept earned, where the reward's
    masks are, where the maps look. Flow-GRPO runs beside it. Learning rates are those at which the scalar arm
    of each objective does best; see docs/evidence/method.md."""
    location, concept = {"advantage": "location"}, {"advantage": "concept"}
    both, half_rate = location | {"location_share": 0.5}, {"optimization": {"learning_rate": 1e-4}}
    grpo: dict[str, Any] = {
        "model": {"lora_rank": 128},
        "sampling": {"trained_steps": (1,), "shared_noise": True, "merge_adapter": True},
        "loss": {"objective": "grpo", "noise_levels": 0, "clip_range": 2e-3},
        "optimization": {"learning_rate": 3.5e-5, "schedule": "constant", "warmup": 0},
    }
    return Study(
        preset="shapes-nft",
        baselines=("uniform", "concept_other", "shuffled"),
        changes={
            # Every checkpoint is kept: the drift at equal score is measured on them.
            "scoring": {"every": 8, "count": 512},
            "run": {"save_every": 8, "keep_checkpoints": 3, "figures": False, "grid_every": 0},
            "sampling": {"images_per_prompt": 6},
            "loss": {"advantage": "image", "location_share": 1.0},
            "optimization": {"iterations": 24, "learning_rate": 2e-4, "warmup": 8, "ema_decay": 0.9},
        },
        arms={
            "uniform": {},
            # The verifier says what each location earned: a perfect map and a perfect judge, the positive control.
            "location": {"loss": location},
            # Half of it the image's: what is missing has no location.
            "location_and_image": {"loss": both},
            # The reward says what each concept earned, and the model's own maps where that belongs.
            "concept": {"loss": concept},
            "concept_other": {"loss": concept | {"concept_maps": "other"}},
            "attention": _allocation("attention"),
            "oracle": _allocation("oracle"),
            "shuffled": _allocation("shuffled"),
            "random": _allocation("random"),
            "topk": _allocation("topk"),
            "topk_late": _allocation("topk", noise_window=(0.0, 0.8)),
            "location_attention": {"loss": location, **_allocation("attention")},
            "location_oracle": {"loss": location, **_allocation("oracle")},
            # Whether a lower rate alone does as much.
            "uniform_half_rate": half_rate,
            "location_and_image_half_rate": {"loss": both, **half_rate},
            "concept_double": {"loss": concept | {"concept_strength": 2.0}},
            "grpo": grpo,
            # The noise of Flow-GRPO's step, and with it what a group differs in, at the locations that the maps choose.
            "grpo_explore": grpo | {"sampling": grpo["sampling"] | {"explore": "maps"}},
        },
    )


PRESETS = {
    EMBEDDED: shapes,
    "credit": credit,
    "global": global_attribute,
    "noise": noise,
    "plain": plain,
    "large_batch": large_batch,
}


def preset(name: str) -> Study:
    if name not in PRESETS:
        raise ConfigError(f"preset: unknown {name!r}, expected one of {sorted(PRESETS)}")
    return PRESETS[name]()
