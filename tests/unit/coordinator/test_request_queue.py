"""Requests wait by arrival, also those that wait again."""

from __future__ import annotations

import pytest
from loop_harness import request

from eft_serve.coordinator.request_queue import FirstComeFirstServed


def test_requests_come_out_by_arrival_a_preempted_one_before_later_ones() -> None:
    queue = FirstComeFirstServed()
    first, second, third = (request(f"r{i}", {"base": [1]}, {"base": 1.0}, now=float(i)) for i in range(3))
    for each in (second, third):
        queue.add(each)
    queue.add(first)  # preempted: it came first
    assert list(queue) == [first, second, third]
    assert queue.peek() is first
    assert [queue.pop(), queue.pop()] == [first, second]
    assert len(queue) == 1


def test_requests_of_one_moment_keep_their_order() -> None:
    queue = FirstComeFirstServed()
    requests = [request(f"r{i}", {"base": [1]}, {"base": 1.0}, now=1.0) for i in range(3)]
    for each in requests:
        queue.add(each)
    assert list(queue) == requests


def test_one_that_does_not_wait_cannot_be_taken_out() -> None:
    queue = FirstComeFirstServed()
    waiting, other = (request(f"r{i}", {"base": [1]}, {"base": 1.0}) for i in range(2))
    queue.add(waiting)
    with pytest.raises(ValueError, match="not in list"):
        queue.remove(other)
    for each in queue:  # may be changed meanwhile
        queue.remove(each)
    with pytest.raises(IndexError):
        queue.peek()
