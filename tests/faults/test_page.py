"""The rows of `page.py`, smaller."""

import pytest

from tests.faults import page

pytestmark = pytest.mark.slow


def test_bad_pictures_and_bodies_over_the_limit():
    assert page.http(mutated=20)["refused"] > 10


def test_many_visitors_at_once():
    # So many in a row that half a megabyte more, which the allocator takes now and then, is no growth.
    figures = page.load(users=4, each=3, in_a_row=500, uploads=15)
    assert figures["busy"] > 0


def test_each_visitor_gets_the_answer_to_his_own_picture():
    assert page.users(count=4, rounds=1)["requests"] == 4 * 4  # each asks four things


def test_a_stranger_gets_no_further_than_the_page():
    assert page.network()["addresses"] > 10
