import pytest

from builders import small_run
from star import train as training


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Two finished runs, one without allocation."""
    folder = tmp_path_factory.mktemp("runs")
    for name, strategy in (("star", "attention"), ("uniform", "uniform")):
        run = {"grid_every": 2, "figures": True}
        changes = {
            "scoring": {"count": 8, "every": 1},
            "allocation": {"strategy": strategy},
            "loss": {"advantage": "concept"},
            "sampling": {"explore": "maps"},
            "optimization": {"update_norm": 0.0},
        }
        training.train(small_run(folder / name, run=run, **changes), ["star", "train", "--out", "with space"])
    return folder
