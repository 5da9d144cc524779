"""Checkpoints that are either whole or absent, and the adapter in diffusers' format.

A checkpoint is a folder `checkpoints/iteration-000050` with `state.pt` (everything the run needs to go on with the same
bits) and `meta.json` (what it is, and a checksum). It is written under another name and then renamed; only then are
older ones deleted.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from peft.utils import get_peft_model_state_dict

from star.files import is_count, parse_object, read_text, sync
from star.messages import one_line
from star.training.distributed import full_tensor
from star.training.families import family_of
from star.training.pipeline import TRAINED, adapter_names

FORMAT = "star-checkpoint-2"
EARLIER = "to go on from an earlier one, delete it"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; its message is one line for the user."""


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(run: Path, iteration: int, state: dict[str, Any], keep: int, seconds: float = 0.0) -> Path:
    """Write the state after `iteration` iterations, which took so many seconds, then delete all but the last `keep`
    checkpoints.

    Raises CheckpointError if it cannot be written, on a full disk for one; what was there before is then untouched.
    """
    folder = run / "checkpoints"
    writing, written = folder / f".writing-{iteration:06d}", folder / f"iteration-{iteration:06d}"
    replaced = folder / f".writing-{iteration:06d}-replaced"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob(".writing-*"):
            shutil.rmtree(left_over)
        writing.mkdir()
        torch.save(state, writing / "state.pt")
        checksum = _checksum(writing / "state.pt")
        meta = {"format": FORMAT, "iteration": iteration, "sha256": checksum, "seconds": seconds}
        (writing / "meta.json").write_text(json.dumps(meta))
        for file in writing.iterdir():
            sync(file)
        sync(writing)
        # Deleting takes a moment, in which a crash would leave half a checkpoint under this name.
        if written.exists():
            written.rename(replaced)
        writing.rename(written)
        sync(folder)
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError without its cause. The space is needed back.
        shutil.rmtree(writing, ignore_errors=True)
        kept = checkpoints(run)
        last = f"the last one is {kept[-1]}" if kept else "there is none before it"
        raise CheckpointError(f"checkpoint: {written} cannot be written ({one_line(error)}); {last}") from error
    shutil.rmtree(replaced, ignore_errors=True)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return written


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = [
        path for path in (run / "checkpoints").glob("iteration-*") if path.name.removeprefix("iteration-").isdigit()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("iteration-")))


def elapsed(path: Path) -> float:
    """Seconds that the run of a checkpoint that was loaded had taken; not part of its state, which has the same bits
    however long it took. 0 where an older version wrote it."""
    seconds = json.loads((path / "meta.json").read_text()).get("seconds", 0.0)
    return seconds if isinstance(seconds, int | float) and math.isfinite(seconds) else 0.0


def read_meta(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: iteration, sha256 of its state, seconds. Raises CheckpointError if it is
    something else."""
    try:
        meta = parse_object(read_text(path / "meta.json"), path / "meta.json")
        if meta.get("format") != FORMAT:
            raise CheckpointError(f"checkpoint: {path} is not a {FORMAT}")
        if not is_count(meta.get("iteration")) or not isinstance(meta.get("sha256"), str):
            raise CheckpointError(f"checkpoint: {path} says neither its iteration nor its checksum; {EARLIER}")
        return meta
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint: {path} cannot be read ({one_line(error)}); {EARLIER}") from error


def load(path: Path) -> dict[str, Any]:
    """Read and verify a checkpoint. Raises CheckpointError if it is damaged or something else."""
    try:
        meta = read_meta(path)
        if _checksum(path / "state.pt") != meta["sha256"]:
            raise CheckpointError(f"checkpoint: {path} is damaged (its checksum differs); {EARLIER}")
        return torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch, pickle and zip raise many kinds
        raise CheckpointError(f"checkpoint: {path} cannot be read ({one_line(error)}); {EARLIER}") from error


def random_state() -> dict[str, Any]:
    """The states of the global generators, which a reward may use, as torch.load takes them without pickle."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def export(pipeline: Any, out: Path, main: bool) -> None:
    """Write the adapter to `out/lora`, so that the pipeline's load_lora_weights gives the trained policy, or without an
    adapter the whole pipeline to `out/model`. All processes take part; only the main one writes. Raises CheckpointError
    if it cannot be written."""
    transformer = pipeline.transformer
    if adapter_names(transformer):
        layers = {name: full_tensor(x, main) for name, x in get_peft_model_state_dict(transformer).items()}
        if main:
            _write(
                out / "lora",
                lambda folder: pipeline.save_lora_weights(
                    folder,
                    transformer_lora_layers={name: x.contiguous() for name, x in layers.items() if x is not None},
                    # Without it the loader takes alpha = rank and applies the adapter with another strength.
                    transformer_lora_adapter_metadata=transformer.peft_config[TRAINED].to_dict(),
                ),
            )
        return
    weights = {name: full_tensor(x, main) for name, x in transformer.state_dict().items()}
    if main:
        family = family_of(pipeline)
        with torch.device("meta"):
            whole = getattr(diffusers, family.transformer).from_config(transformer.config)
        whole.load_state_dict(weights, assign=True)
        parts = {**pipeline.components, "transformer": whole}
        _write(out / "model", getattr(diffusers, family.pipeline)(**parts).save_pretrained)


def _write(folder: Path, save: Callable[[Path], object]) -> None:
    try:
        save(folder)
    except Exception as error:  # safetensors has an error of its own for a full disk
        raise CheckpointError(
            f"export: {folder} cannot be written ({one_line(error)}); the checkpoints are whole, --resume writes it"
        ) from error
