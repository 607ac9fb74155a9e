import pytest

from tests.faults import training


@pytest.mark.slow
def test_killed_again_and_again_it_ends_as_if_it_had_not_been():
    assert training.kill(times=8)["left_a_half_checkpoint"] >= 2


@pytest.mark.slow
def test_a_full_disk_costs_no_checkpoint():
    figures = training.full_disk(places=3)
    assert figures["places_of_a_save"] == 3
    assert sum("bytes free" in line for line in figures["messages"]) == len(figures["messages"]) - 1  # the model's


@pytest.mark.slow
def test_a_half_made_or_unwritable_cache(cifar10):
    assert training.cache(cifar10, kills=4)["killed_while_decoding"] >= 2
