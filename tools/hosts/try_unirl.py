"""UniRL's own rollout, replay and update of SD3 on the CPU, without and with its diff: `try_unirl.py CHECKOUT`.

`DiffusionTrainer.train_step`, `TrainStack`, `FlowGRPO`, `SD3Pipeline` and the trainside engine run as they are, in one
process and without Ray; a stand-in for the FSDP backend holds a plain optimizer. Stubs stand for Ray and Hydra.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trial import ROOT, Trace, exact, main, stub_missing

PROMPTS = ["a red bench left of two green cats", "a dog under a blue umbrella"]
ROLLOUTS = 2


def run(checkout: Path, case: str, trace: Trace) -> None:
    """ROLLOUTS training steps of two updates each."""
    import tiny
    import torch

    parts = tiny.sd35(PROMPTS)  # before the stubs: diffusers asks what is there when it is imported
    stub_missing(["ray", "hydra", "wandb", "torchvision", "cupy", "datasets"])
    from unirl.algorithms.flowgrpo import FlowGRPO
    from unirl.models.sd3.bundle import SD3Bundle
    from unirl.models.sd3.conditions import SD3Conditions
    from unirl.models.sd3.pipeline import SD3Pipeline
    from unirl.rollout.engine.trainside.engine import TrainsideRolloutEngine
    from unirl.sde.kernels import FlowSDEStrategy
    from unirl.train.stack import TrainStack
    from unirl.trainer.diffusion import DiffusionTrainer
    from unirl.types.primitives import Texts
    from unirl.types.prompts import RolloutInputs
    from unirl.types.sampling import DiffusionSamplingParams

    names = [f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
    modules = {name: getattr(parts, name) for name in (*names, "transformer", "vae", "scheduler")}
    bundle = SD3Bundle(**modules, dtype=torch.float32, device=torch.device("cpu"), pretrained_path=None)
    precision = {f"{name}_precision": "fp32" for name in ("autocast", "trajectory", "logprob")}
    pipeline = SD3Pipeline(bundle=bundle, strategy=FlowSDEStrategy(), **precision)
    sampling = DiffusionSamplingParams(
        samples_per_prompt=2, num_inference_steps=5, guidance_scale=4.5, height=64, width=96, eta=0.7,
        sde_indices=[1, 2, 3], **precision,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(bundle.transformer.parameters(), 1e-4)

    class Backend:
        """The training state of the host's FSDPBackend, in one process."""

        grad_sync_deferred, scheduler = False, None

        def __init__(self) -> None:
            self.optimizer = optimizer

        def trainable_module(self) -> torch.nn.Module:
            return bundle.transformer

        def zero_grad(self) -> None:
            optimizer.zero_grad()

        def set_grad_sync(self, sync: bool) -> None:
            pass

        def optimizer_step(self, max_grad_norm: float) -> torch.Tensor:
            norm = torch.nn.utils.clip_grad_norm_(bundle.transformer.parameters(), max_grad_norm)
            optimizer.step()
            return norm

        def on_rollout_end(self) -> None:
            pass

    class Brightness:
        """A reward that tells images apart."""

        def score_and_attach(self, req: Any, track: Any) -> Any:
            track.rewards = track.decoded.pixels.mean((1, 2, 3))
            return track

    class Log:
        """The host's logger: all metrics of each update, and what a rollout was."""

        def should_log_media(self, rollout: int) -> bool:
            return False

        def log_rollout_step(self, rollout: int, result: Any, resp: Any, step_time_s: float) -> None:
            (track,) = resp.tracks.values()
            trace.lines.extend(json.dumps(exact(dict(update))) for update in result.per_update)
            trace.lines.append(json.dumps(exact([rollout, result.loss, result.grad_norm, dict(result.metrics)])))
            trace.lines.append(json.dumps(exact([track.rewards, track.advantages, track.segment.sde_logp])))

    algorithm = FlowGRPO(pipeline=pipeline, params=sampling, conditions_cls=SD3Conditions, old_logp_source="replay")
    trainer = object.__new__(DiffusionTrainer)
    vars(trainer).update(
        stack=TrainStack(
            fsdp_backend=Backend(), algorithm=algorithm, micro_batch_size=1, max_grad_norm=1.0, num_updates_per_batch=2
        ),
        rollout=TrainsideRolloutEngine(pipeline=pipeline, forward_batch_size=2),
        reward=Brightness(),
        wandb_logger=Log(),
        sampling_params=sampling,
        weight_sync=None,
        _noise_latent_shape=SD3Pipeline.latent_shape(model_config=None, sampling_spec=sampling),
        _enable_fsdp_offload=False,
        _layout="colocate",
        _rollout_is_trainside=True,
        _uses_ema=False,
        _adv_use_global_std=True,
        batch_size=len(PROMPTS),
        cfg=SimpleNamespace(),
    )
    inputs = RolloutInputs(
        primitives={"text": Texts(texts=PROMPTS)},
        sample_ids=["a", "b"],
        group_ids=["0", "1"],
    )
    for rollout in range(ROLLOUTS):
        _, reward = trainer.train_step(trainer._build_req(inputs, rollout), rollout_id=rollout)
        trace.lines.append(json.dumps(exact(reward)))


if __name__ == "__main__":
    main(run, ["unirl"], {"sd3": ROOT / "examples" / "unirl" / "star.diff"}, __doc__)
