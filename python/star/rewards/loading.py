"""Reward models from folders, files and the hub: whole, or not at all.

A weight that a file lacks would be drawn at random, a weight of no use belongs to another model, and a tokenizer
without its files reads no prompt. Each of them is a RewardError here, in one line that says what to do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from star.messages import one_line
from star.rewards import RewardError

SETTING = "run.reward_models, or --models outside a run"
SHOWN = 3  # names of weights that a message tells
# Tables of indices that older files hold and that networks compute for themselves: they were never learned.
INDEX_TABLES = ("position_ids", "relative_position_index")


def unreadable(name: str, path: str, error: Exception) -> RewardError:
    """The line for a file or folder that could not be read at all. name: of the reward."""
    return RewardError(f"reward: {name!r} could not load {path!r}; say where it is by {SETTING} ({one_line(error)})")


def check_weights(name: str, path: str, missing: Collection[str], unused: Collection[str]) -> None:
    """Raise RewardError unless every weight of the network was in the file and every one in the file was used."""
    unused = [key for key in unused if not key.endswith(INDEX_TABLES)]
    wrong = [f"it lacks {_few(missing)}"] * bool(missing) + [f"it has {_few(unused)}, of no use there"] * bool(unused)
    if wrong:
        raise RewardError(
            f"reward: {name!r} cannot use {path!r}: {' and '.join(wrong)}; set run.reward_models to the whole model"
        )


def _few(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:SHOWN])
    weights = "1 weight" if len(names) == 1 else f"{len(names)} weights"
    return f"{weights} ({shown}{', ...' if len(names) > SHOWN else ''})"


def load_pretrained(name: str, kind: Any, path: str, device: torch.device | str) -> Any:
    """A transformers model of the class `kind` in float32, from a folder or hub id, in evaluation mode."""
    try:
        model, report = kind.from_pretrained(path, output_loading_info=True)
    except Exception as error:  # transformers raises many kinds
        raise unreadable(name, path, error) from error
    mismatched = {key for key, *_ in report["mismatched_keys"]}
    check_weights(name, path, {*report["missing_keys"], *mismatched}, report["unexpected_keys"])
    if problems := [*report.get("error_msgs", ()), *report.get("conversion_errors", {}).values()]:
        raise unreadable(name, path, ValueError(problems[0]))
    return model.float().to(device).eval().requires_grad_(False)


def fill(name: str, path: str, network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a network the weights that a file has under the network's own names."""
    try:
        missing, unused = network.load_state_dict(state, strict=False)
    except RuntimeError as error:  # shapes
        raise unreadable(name, path, error) from error
    check_weights(name, path, missing, unused)


def load_tokenizer(name: str, key: str, path: str, words: int) -> PreTrainedTokenizerBase:
    """The tokenizer of a text network with `words` embeddings, from a folder or hub id. key: of run.reward_models,
    which says where it is."""
    advice = f"put the tokenizer's files there, or set run.reward_models {key}"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise RewardError(f"reward: {name!r} found no tokenizer in {path!r} ({one_line(error)}); {advice}") from error
    count = len(tokenizer)
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        what = f"no vocabulary in {path!r}: {' or '.join(_files(tokenizer))} is missing"
    elif count > words or count < words / 2:
        what = f"a tokenizer of {count} words in {path!r}, its text network has {words}"
    else:
        return tokenizer
    raise RewardError(f"reward: {name!r} found {what}; {advice}")


def _files(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    names = tokenizer.vocab_files_names
    whole = names.get("tokenizer_file")
    parts = " and ".join(file for role, file in names.items() if role != "tokenizer_file")
    return [file for file in (whole, parts) if file] or ["tokenizer.json"]


def load_state(name: str, path: str | None, default: tuple[str, str]) -> tuple[dict[str, Tensor], str]:
    """A state dict from a file, or from the hub's `default` (repository, file); and the file's path. Nothing in it is
    executed."""
    shown = path or "/".join(default)
    try:
        if path is None:
            from huggingface_hub import hf_hub_download

            path = hf_hub_download(*default)
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # OSError, the hub's own, pickle's and safetensors'
        raise unreadable(name, shown, error) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not state or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise RewardError(f"reward: {name!r} found no state dict in {shown!r}; say where it is by {SETTING}")
    return state, shown


def load_head(name: str, path: str, state: Mapping[str, Tensor], width: int) -> nn.Sequential:
    """The linear layers "layers.N.weight", "layers.N.bias" in their order, one after the other: from `width` to 1.

    The aesthetic predictor and ImageReward were trained with dropout and nothing else between them.
    """
    numbers = sorted(
        int(parts[1])
        for parts in (key.split(".") for key in state)
        if len(parts) == 3 and parts[0] == "layers" and parts[2] == "weight" and parts[1].isdecimal()
    )
    if not numbers:
        raise RewardError(f"reward: {name!r} found no 'layers.N.weight' among {sorted(state)[:3]} of {path!r}")
    weights = [state[f"layers.{number}.weight"] for number in numbers]
    widths = [width, *(len(weight) for weight in weights)]
    for number, weight, inputs in zip(numbers, weights, widths[:-1], strict=True):
        if weight.ndim != 2 or weight.shape[1] != inputs:
            raise RewardError(
                f"reward: {name!r} cannot use {path!r}: layers.{number}.weight has shape {tuple(weight.shape)}, "
                f"expected (outputs, {inputs}); set run.reward_models to the head of this model"
            )
    if widths[-1] != 1:
        raise RewardError(f"reward: {name!r} cannot use {path!r}: its last layer has {widths[-1]} outputs, expected 1")
    head = nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(widths)))
    order = {f"layers.{number}": str(index) for index, number in enumerate(numbers)}
    parts = {key: key.rpartition(".") for key in state}
    fill(
        name,
        path,
        head,
        {".".join((order.get(layer, layer), kind)): state[key] for key, (layer, _, kind) in parts.items()},
    )
    return head.eval().requires_grad_(False)
