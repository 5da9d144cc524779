"""Checkpoints that are either whole or absent, and the adapter in diffusers' format.

A checkpoint is a folder `checkpoints/iteration-000050` with `state.pt` (everything the run needs to go on with the same
bits) and `meta.json` (what it is, and a checksum). It is written beside its place and then renamed into it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from peft.utils import get_peft_model_state_dict

FORMAT = "star-checkpoint-1"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; its message is one line for the user."""


def _sync(path: Path) -> None:
    """Ask the disk to keep a file or a folder before anything relies on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(run: Path, iteration: int, state: dict[str, Any], keep: int) -> Path:
    """Write the state after `iteration` iterations, then delete all but the last `keep` checkpoints."""
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(".writing-*"):
        shutil.rmtree(left_over)
    writing, place = folder / f".writing-{iteration:06d}", folder / f"iteration-{iteration:06d}"
    writing.mkdir()
    torch.save(state, writing / "state.pt")
    meta = {"format": FORMAT, "iteration": iteration, "sha256": _checksum(writing / "state.pt")}
    (writing / "meta.json").write_text(json.dumps(meta))
    for file in writing.iterdir():
        _sync(file)
    _sync(writing)
    if place.exists():
        shutil.rmtree(place)
    writing.rename(place)
    _sync(folder)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return place


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((run / "checkpoints").glob("iteration-*"))


def load(path: Path) -> dict[str, Any]:
    """Read and verify a checkpoint. Raises CheckpointError if it is damaged or something else."""
    try:
        meta = json.loads((path / "meta.json").read_text())
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise CheckpointError(f"checkpoint: {path} is not a {FORMAT}")
        if _checksum(path / "state.pt") != meta["sha256"]:
            raise CheckpointError(f"checkpoint: {path} is damaged (its checksum differs)")
        return torch.load(path / "state.pt", weights_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint: {path} cannot be read ({error})") from error


def export_lora(transformer: torch.nn.Module, path: Path) -> None:
    """Write the adapter so that StableDiffusion3Pipeline.load_lora_weights(path) gives the trained policy."""
    adapter = transformer.peft_config["default"]
    StableDiffusion3Pipeline.save_lora_weights(
        path,
        transformer_lora_layers={k: v.contiguous() for k, v in get_peft_model_state_dict(transformer).items()},
        # Without it the loader takes alpha = rank and applies the adapter with another strength.
        transformer_lora_adapter_metadata=adapter.to_dict(),
    )
