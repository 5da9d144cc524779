"""Two processes are one: the same images, advantages and losses, in DDP and in FSDP2, on gloo."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

from forking import fork, free_port, ranks, serve, wait
from star import config as configuration
from star import train as training
from star.config import ConfigError
from star.presets import preset
from star.shapes.model import load_pipeline
from star.training import checkpoint
from star.training.distributed import full_tensor, make_accelerator

ITERATIONS = 2
AVERAGE = {"ema_decay": 0.9, "ema_every": 1}
CASES = {
    # What is also run with sharded weights does not merge the adapter.
    "plain": {"sampling": {"merge_adapter": False}},
    # The controls look at other processes' samples; guidance, own noise and the reference need more passes.
    "control": {
        "allocation": {"strategy": "shuffled"},
        "loss": {"global_std": True},
        "optimization": {"updates_per_iteration": 2},
    },
    # Credits of concepts are gathered, and each process explores where its own maps look.
    "guided": {
        "sampling": {"guidance_scale": 2.0, "shared_noise": False, "explore": "maps"},
        "loss": {"kl_coef": 0.1, "advantage": "concept"},
    },
    # Each image has its own noise levels, and passes of the old policy come between those with gradients.
    "nft": {
        "sampling": {"trained_steps": [0, 1, 2], "shared_noise": False, "merge_adapter": False},
        "loss": {
            "objective": "nft",
            "noise_levels": 2,
            "old_decay": 0.9,
            "old_decay_rate": 0.3,
            "advantage": "concept",
        },
    },
    # The maps come from the old policy's passes, the ratio from none.
    "awm": {
        "sampling": {"trained_steps": [0, 1, 2], "shared_noise": False},
        "loss": {"objective": "awm", "noise_levels": 2, "old_decay": 0.9, "old_decay_rate": 0.3, "kl_coef": 0.1},
    },
    # Every process samples the first image of every prompt.
    "full": {
        "model": {"lora_rank": 0},
        "sampling": {"merge_adapter": False, "explore": "masks"},
        "loss": {"kl_coef": 0.1},
        "optimization": {"learning_rate": 1e-5},
    },
}
SHARDED = ("plain", "nft", "full")


def small_run(out, case):
    config = preset("shapes")
    base = {
        "sampling": {"prompts_per_iteration": 2, "images_per_prompt": 4, "steps": 3, "trained_steps": [1]},
        # Two micro batches for each process and update: gradients are exchanged after the second.
        "optimization": {"iterations": ITERATIONS, "updates_per_iteration": 1, "micro_batch": 2, **AVERAGE},
        "scoring": {"count": 2},
        "run": {"out": str(out), "figures": False, "save_every": 1, "keep_checkpoints": 9},
    }
    return configuration.update(configuration.update(config, base), CASES[case])


def fsdp_accelerator(config):
    """accelerate shards on GPUs only; its code for FSDP2 runs on gloo all the same once it is told to."""
    accelerator = make_accelerator(config)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    return accelerator


def run(folder, name, case, sharded=False, resume=False):
    if sharded:
        training.make_accelerator = fsdp_accelerator
    advantages = []
    measured = training.compute_advantages

    def recorded(*arguments, **options):
        advantages.append(measured(*arguments, **options).tolist())
        return torch.tensor(advantages[-1])

    training.compute_advantages = recorded
    config = small_run(Path(folder) / name, case)
    config.run.resume = resume
    training.train(config)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    (Path(folder) / f"{name}-{rank}.json").write_text(json.dumps(advantages))


def replace(folder, name, sharded=False):
    """Velocities of one and the same sample before, while and after the weights are others."""
    if sharded:
        training.make_accelerator = fsdp_accelerator
    config = small_run(Path(folder) / name, "full")
    config.sampling.explore = "everywhere"
    trainer = training.Trainer(config)
    policy, rows = trainer.policy, torch.arange(1)
    rollout = trainer.rollout(["red circle", "green ring"], torch.Generator().manual_seed(0))
    others = [1.5 * p.detach() for p in policy.parameters.values()]

    @torch.no_grad()
    def velocity(replaced):
        with policy.replaced(others) if replaced else nullcontext():
            return rollout.velocity(policy.unwrapped(), 0, rows)

    def gradient_norm(between):
        """As GRPO's loss does: the reference runs while the policy's graph waits for its backward pass."""
        loss = rollout.velocity(policy.transformer, 0, rows).square().sum()
        between()
        policy.accelerator.backward(loss)
        norm = policy.accelerator.clip_grad_norm_(policy.transformer.parameters(), 1e9)
        policy.optimizer.zero_grad()
        return full_tensor(norm)

    velocities = [velocity(False), velocity(True), velocity(False)]
    norms = [gradient_norm(lambda: None), gradient_norm(lambda: velocities.append(velocity(True)))]
    torch.save((torch.stack(velocities), norms), Path(folder) / f"{name}-{trainer.accelerator.process_index}")


def both(folder):
    folder = Path(folder)
    assert wait(fork(replace, folder, "replaced-1", output=folder / "log")) == 0, (folder / "log").read_text()
    codes = ranks(2, replace, folder, "replaced-fsdp", True, port=free_port(), output=folder / "log")
    assert codes == [0, 0], (folder / "log.0").read_text() + (folder / "log.1").read_text()
    for case in CASES:
        assert wait(fork(run, folder, f"{case}-1", case, output=folder / "log")) == 0, (folder / "log").read_text()
        codes = ranks(2, run, folder, f"{case}-2", case, port=free_port(), output=folder / "log")
        assert codes == [0, 0], (folder / "log.0").read_text() + (folder / "log.1").read_text()
    for case in SHARDED:
        codes = ranks(2, run, folder, f"{case}-fsdp", case, True, port=free_port(), output=folder / "log")
        assert codes == [0, 0], (folder / "log.0").read_text() + (folder / "log.1").read_text()
    assert ranks(1, run, folder, "refused", "guided", True, port=free_port(), output=folder / "refused") != [0]
    # A checkpoint of sharded processes goes on in one, and one of one process in sharded ones.
    for source, name, sharded in (("plain-fsdp", "plain-fsdp-1", False), ("plain-1", "plain-1-fsdp", True)):
        target = folder / name
        target.mkdir()
        configuration.save(small_run(target, "plain"), target / "config.yaml")
        for file in ("metrics.jsonl", "evaluations.jsonl"):
            (target / file).write_bytes((folder / source / file).read_bytes())
        place = target / "checkpoints/iteration-000001"
        place.mkdir(parents=True)
        for file in (folder / source / "checkpoints/iteration-000001").iterdir():
            (place / file.name).write_bytes(file.read_bytes())
        if sharded:
            codes = ranks(2, run, folder, name, "plain", True, True, port=free_port(), output=folder / "log")
        else:
            codes = [wait(fork(run, folder, name, "plain", False, True, output=folder / "log"))]
        assert not any(codes), [path.read_text() for path in folder.glob("log*")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    serve("test_distributed:both", str(folder))
    return folder


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_equal_to_one(runs, name, one):
    got, expected = metrics(runs / name), metrics(runs / one)
    assert len(got) == len(expected) == ITERATIONS
    # Before the first update the two compute the very same things.
    assert got[0]["reward"] == expected[0]["reward"] and got[0]["reward_std"] == expected[0]["reward_std"]
    advantages = [json.loads((runs / f"{n}-{r}.json").read_text()) for n, r in ((name, 0), (name, 1), (one, 0))]
    assert advantages[0][0] == advantages[1][0] == advantages[2][0] and len(advantages[0][0]) == 8
    assert advantages[0] == advantages[1]
    # After it they differ by the order in which gradients are added.
    for line, other in zip(got, expected, strict=True):
        assert line.keys() == other.keys()
        for key in line:
            if not key.startswith(("seconds/", "memory", "ratio", "clip", "old_deviation")):
                # Each process divides by the area of its own objects.
                near = 2e-2 if key == "weights_on_object" else 2e-3
                assert line[key] == pytest.approx(other[key], rel=near, abs=2e-5), (line["iteration"], key)
        assert line.get("ratio_first", 1.0) == 1.0


def state(out):
    return checkpoint.load(checkpoint.checkpoints(out)[-1])


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(runs, case):
    assert_equal_to_one(runs, f"{case}-2", f"{case}-1")


@pytest.mark.parametrize("case", SHARDED)
def test_two_sharded_processes_are_one(runs, case):
    assert_equal_to_one(runs, f"{case}-fsdp", f"{case}-1")
    got, expected = state(runs / f"{case}-fsdp"), state(runs / f"{case}-1")
    assert not any(isinstance(x, DTensor) for x in torch.utils._pytree.tree_leaves(got))
    # Adam's first steps have the size of the learning rate whatever the gradient, also where it is only rounding.
    rate = got["optimizer"]["param_groups"][0]["lr"]
    for name, value in expected["parameters"].items():
        torch.testing.assert_close(got["parameters"][name], value, rtol=0, atol=2 * ITERATIONS * rate, msg=name)
    assert len(got["random"]) == 2 and len(got["ema"]["shadow_params"]) == len(expected["parameters"])


def test_sharded_weights_that_are_replaced_are_used(runs):
    expected, norms = torch.load(runs / "replaced-1-0")
    got, sharded_norms = torch.load(runs / "replaced-fsdp-0")
    assert not torch.allclose(expected[0], expected[1], rtol=0.1)
    assert torch.equal(expected[0], expected[2]) and torch.equal(expected[1], expected[3])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert norms[0] == norms[1] and sharded_norms[0] == sharded_norms[1] > 0


def test_checkpoints_do_not_depend_on_the_number_of_processes(runs):
    for name in ("plain-fsdp-1", "plain-1-fsdp"):
        last, expected = metrics(runs / name)[-1], metrics(runs / "plain-1")[-1]
        assert [line["iteration"] for line in metrics(runs / name)] == [0, 1]
        assert last["reward"] == pytest.approx(expected["reward"], rel=1e-3)
        assert last["loss"] == pytest.approx(expected["loss"], rel=2e-3, abs=2e-5)


def test_an_adapter_of_sharded_weights_is_not_merged(runs):
    assert (
        "sampling.merge_adapter: got True, expected False with weights that are sharded"
        in (runs / "refused.0").read_text()
    )


@pytest.mark.parametrize("name", ["plain-2", "plain-fsdp", "plain-1"])
def test_one_process_writes_everything_once(runs, name):
    left = {path.name for path in (runs / name).iterdir()}
    assert left == {path.name for path in (runs / "plain-1").iterdir()}
    assert len(list((runs / name / "tensorboard").iterdir())) == 1
    assert {"lora", "summary.json", "evaluations.jsonl", "held_out"} <= left
    pipeline = load_pipeline()
    pipeline.load_lora_weights(str(runs / name / "lora"))


def test_a_number_of_processes_that_does_not_fit_is_one_clear_line(tmp_path):
    config = small_run(tmp_path, "plain")
    with pytest.raises(ConfigError, match="accelerate: got 3 processes, expected a divisor of an update's 8 images"):
        config.check(3)
    with pytest.raises(
        ConfigError, match="micro_batch: got 2, expected a divisor of an update's 8 images, 1 for each process"
    ):
        config.check(8)
