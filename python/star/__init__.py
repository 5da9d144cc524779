"""Post-training of text-to-image models with spatiotemporal reward allocation.

What another trainer needs, loaded when it is first used: `star.objective` needs torch and star_kernels alone,
`star.capture` and `star.concepts` need diffusers and transformers as well.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from star.capture import allocated, record
    from star.concepts import ConceptTokens, concept_tokens
    from star.objective import Allocation, grpo_loss, sde_step_with_logprob, weighted_gradient

_HOMES = {
    "Allocation": "star.objective",
    "ConceptTokens": "star.concepts",
    "allocated": "star.capture",
    "concept_tokens": "star.concepts",
    "grpo_loss": "star.objective",
    "record": "star.capture",
    "sde_step_with_logprob": "star.objective",
    "weighted_gradient": "star.objective",
}

__all__ = [
    "Allocation",
    "ConceptTokens",
    "allocated",
    "concept_tokens",
    "grpo_loss",
    "record",
    "sde_step_with_logprob",
    "weighted_gradient",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'star' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
