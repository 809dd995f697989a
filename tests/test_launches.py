"""The record of launches."""

import threading

import pytest

from fused_inception import Launch, record_launches
from fused_inception.launches import record


def test_nothing_is_recorded_outside() -> None:
    with record_launches() as launches:
        pass
    record("late", (1,), {})
    assert launches == []


def test_order_and_contents() -> None:
    with record_launches() as launches:
        record("first", (3, 2), {"BLOCK": 16})
        record("second", (1,), {})
    assert launches == [Launch("first", (3, 2), {"BLOCK": 16}), Launch("second", (1,), {})]


def test_a_record_does_not_follow_its_source() -> None:
    config = {"BLOCK": 16}
    with record_launches() as launches:
        record("kernel", (1,), config)
    config["BLOCK"] = 32
    assert launches[0].config == {"BLOCK": 16}


def test_blocks_nest() -> None:
    with record_launches() as outer:
        record("a", (1,), {})
        with record_launches() as inner:
            record("b", (1,), {})
        record("c", (1,), {})
    assert [launch.kernel for launch in outer] == ["a", "b", "c"]
    assert [launch.kernel for launch in inner] == ["b"]


def test_blocks_that_are_still_empty_are_told_apart() -> None:
    first, second = record_launches(), record_launches()
    one, two = first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    record("kernel", (1,), {})
    second.__exit__(None, None, None)
    assert one == []
    assert [launch.kernel for launch in two] == ["kernel"]


def test_an_error_closes_the_block() -> None:
    with pytest.raises(KeyError), record_launches() as launches:
        raise KeyError
    record("kernel", (1,), {})
    assert launches == []


def test_all_threads_are_seen() -> None:
    def work() -> None:
        for i in range(200):
            record("kernel", (i,), {})

    threads = [threading.Thread(target=work) for _ in range(8)]
    with record_launches() as launches:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(launch.grid[0] for launch in launches) == sorted(list(range(200)) * 8)


def test_launches_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Launch("kernel", (1,), {}).kernel = "other"  # type: ignore[misc]
