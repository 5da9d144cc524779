"""Work is never lost: kill -9 at any moment, SIGTERM, a full disk, another process that is gone."""

import json
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

from forking import fork, free_port, ranks, serve, wait
from star import config as configuration
from star.cli import main
from star.presets import preset
from star.rewards import Scores
from star.training import checkpoint

KILLS = 20
ITERATIONS = 8
TINY = [
    *("train", "--preset", "shapes", "--sampling.prompts-per-iteration", "2", "--sampling.images-per-prompt", "2"),
    *("--sampling.steps", "3", "--sampling.trained-steps", "1", "--optimization.updates-per-iteration", "2"),
    *("--optimization.ema-decay", "0.9", "--optimization.ema-every", "1", "--optimization.learning-rate", "1e-2"),
    *("--scoring.count", "2", "--run.no-figures", "--run.save-every", "1", "--run.reward", "test_recovery:reward"),
]
NFT = (
    "--loss.objective",
    "nft",
    "--sampling.no-shared-noise",
    "--loss.noise-levels",
    "1",
    "--loss.old-decay-rate",
    "0.2",
)


def reward(images, prompts, metadata):
    """It depends on the global generator, and does what the environment asks."""
    pause = float(os.environ.get("TEST_PAUSE", 0))
    time.sleep(pause)
    last = Path(os.environ.get("TEST_LOST", "/nowhere"))
    if last.exists() and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return Scores(images.mean((1, 2, 3)) + 0.1 * torch.rand(len(prompts)))


def tiny(out, *more, iterations=ITERATIONS):
    return main([*TINY, "--out", str(out), "--optimization.iterations", str(iterations), *more])


def resumed(out, *more, **options):
    return tiny(out, *more, *(["--resume"] if (out / "config.yaml").exists() else []), **options)


# --- in a process of its own, which forks ---------------------------------------------------------------------------


def kill_at_random_moments(folder):
    """Start a run again and again and kill it, until it is through; then the next run."""
    folder = Path(folder)
    begin = time.perf_counter()
    assert wait(fork(tiny, folder / "whole", output=folder / "whole.log")) == 0
    duration = time.perf_counter() - begin
    assert wait(fork(tiny, folder / "whole-nft", *NFT, output=folder / "whole.log")) == 0
    rng, kills, run, moments = random.Random(7), 0, 0, []
    while kills < KILLS or run < 2:
        run += 1
        out, objective = folder / f"killed-{run}", NFT if run % 2 else ()
        while True:
            child = fork(resumed, out, *objective, output=folder / "killed.log")
            time.sleep(rng.uniform(0.1, 0.5) * duration)
            os.kill(child, signal.SIGKILL)
            code = wait(child)
            if code != -signal.SIGKILL:
                assert code == 0, (folder / "killed.log").read_text()
                break
            kills += 1
            moments.append(len(checkpoint.checkpoints(out)) and int(checkpoint.checkpoints(out)[-1].name[-6:]))
    (folder / "kills.json").write_text(json.dumps({"kills": kills, "runs": run, "moments": moments}))


def stop_and_fill(folder):
    folder = Path(folder)
    # Here, like the others: matrix products have the same bits for the same number of threads only.
    assert wait(fork(tiny, folder / "whole", output=folder / "whole.log")) == 0
    child = fork(tiny, folder / "stopped", output=folder / "stopped.log", environment={"TEST_PAUSE": "0.2"})
    while not checkpoint.checkpoints(folder / "stopped"):
        time.sleep(0.02)
    os.kill(child, signal.SIGTERM)
    assert wait(child) == 0
    last = checkpoint.load(checkpoint.checkpoints(folder / "stopped")[-1])["iteration"]
    assert 0 < last < ITERATIONS
    assert wait(fork(resumed, folder / "stopped", output=folder / "continued.log")) == 0

    def full_disk():
        size = (checkpoint.checkpoints(folder / "full")[-1] / "state.pt").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))
        return resumed(folder / "full", iterations=3)

    assert wait(fork(lambda: tiny(folder / "full", iterations=2), output=folder / "first.log")) == 0
    assert wait(fork(full_disk, output=folder / "full.log")) == 1

    def two(iterations):
        return resumed(folder / "lost", "--scoring.count", "0", iterations=iterations)

    assert ranks(2, two, 2, port=free_port(), output=folder / "two") == [0, 0]
    (folder / "now").touch()
    os.environ["TEST_LOST"] = str(folder / "now")
    assert ranks(2, two, 4, port=free_port(), output=folder / "lost-rank") == [1, -signal.SIGKILL]


# --- what they leave --------------------------------------------------------------------------------------------------


def metrics(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if not name.startswith(("seconds/", "memory"))} for line in lines
    ]


def assert_same_run(out, whole):
    """Parameters, moments, averages and generators bit for bit, and every line of metrics."""
    states = [checkpoint.load(checkpoint.checkpoints(folder)[-1]) for folder in (out, whole)]
    flat = [torch.utils._pytree.tree_flatten_with_path(state)[0] for state in states]
    for (path, got), (_, expected) in zip(*flat, strict=True):
        same = torch.equal(got, expected) if isinstance(got, torch.Tensor) else got == expected
        assert same, path
    assert metrics(out) == metrics(whole)
    assert [line["iteration"] for line in metrics(out)] == list(range(ITERATIONS))
    before = [json.loads((folder / "summary.json").read_text()) for folder in (out, whole)]
    assert before[0] | {"seconds": 0} == before[1] | {"seconds": 0}


def test_a_run_killed_at_any_moment_continues_bit_for_bit(tmp_path):
    serve("test_recovery:kill_at_random_moments", str(tmp_path))
    report = json.loads((tmp_path / "kills.json").read_text())
    assert report["kills"] >= KILLS and report["runs"] >= 2
    # Not all in one phase: some before the first checkpoint or early, some late.
    assert len(set(report["moments"])) >= 4
    for run in range(1, report["runs"] + 1):
        assert_same_run(tmp_path / f"killed-{run}", tmp_path / ("whole-nft" if run % 2 else "whole"))


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ended")
    serve("test_recovery:stop_and_fill", str(folder))
    return folder


def last_line(path):
    return path.read_text().strip().splitlines()[-1]


def test_a_sigterm_saves_and_ends_with_zero(ended):
    assert last_line(ended / "stopped.log").startswith("stopped by SIGTERM after ")
    assert_same_run(ended / "stopped", ended / "whole")


def test_a_full_disk_leaves_the_last_checkpoint(ended):
    (last, *_) = reversed(checkpoint.checkpoints(ended / "full"))
    message = last_line(ended / "full.log")
    assert message.startswith("star: checkpoint: ") and "iteration-000003 cannot be written (" in message
    assert message.endswith(f"the last one is {last}") and last.name == "iteration-000002"
    assert checkpoint.load(last)["iteration"] == 2
    assert not list((ended / "full/checkpoints").glob(".*"))
    assert resumed(ended / "full", iterations=3) == 0


def test_a_lost_process_ends_the_others_with_a_message(ended):
    assert last_line(ended / "lost-rank.0").startswith("star: accelerate: another process of the run was lost (")
    assert checkpoint.load(checkpoint.checkpoints(ended / "lost")[-1])["iteration"] == 2
    assert resumed(ended / "lost", "--scoring.count", "0", iterations=3) == 0


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "config.yaml"
    configuration.save(preset("shapes"), path)
    before = path.read_bytes()

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        configuration.files.replace(path, fail)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
