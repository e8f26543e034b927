"""Every step of random interleavings of the real lending.py is one of the model that `test_lending_model.py` explores."""

from __future__ import annotations

import gc

import pytest

from tests.tiers.lockstep import World, stepped_lending
from tests.tiers.protocol import Scenario

MANY = {"offers": 10**6, "writes": 9, "releases": 10**6}


@pytest.mark.parametrize("kill", [0.0, 0.003])
@pytest.mark.parametrize(
    "scenario",
    [
        Scenario(blocks=((0, 0), (0, 0)), lots=1, **MANY),
        Scenario(blocks=((0, 1), (0, 1)), lots=2, **MANY),
    ],
    ids=["one lot", "two lots"],
)
@pytest.mark.usefixtures("no_fd_leak")
def test_every_step_of_the_real_table_is_one_of_the_model(scenario: Scenario, kill: float) -> None:
    steps = 0
    for seed in range(20):
        with stepped_lending(seed):
            world = World(scenario, seed)
            world.run(most_steps=400, kill=kill)
        steps += world.steps
        del world
        gc.collect()  # a table's mapping has a descriptor of its own, and actors and tables know each other
    assert steps > 2000
