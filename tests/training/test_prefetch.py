import threading
import time
import traceback

import pytest

from gemini_gnn.errors import ExchangeError
from gemini_gnn.training.prefetch import prefetch


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert [t.name for t in threading.enumerate() if t.name == "prefetch"] == []


def eventually(condition, limit_s=10.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.001)


@pytest.mark.parametrize("depth", [0, 1, 3, 50])
def test_items_come_in_order_and_complete_runs_in_the_consumer(depth):
    preparers, completers = set(), set()

    def prepare(key):
        preparers.add(threading.current_thread().name)
        return key * key

    def complete(item):
        completers.add(threading.current_thread())
        return -item

    with prefetch(prepare, range(20), depth, complete=complete) as items:
        assert list(items) == [-key * key for key in range(20)]
        assert list(items) == []
    assert completers == {threading.current_thread()}
    assert preparers == ({"prefetch"} if depth else {threading.current_thread().name})


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_an_exception_comes_in_its_place_with_its_traceback(depth):
    def prepare(key):
        if key == 2:
            raise KeyError("a place in prepare")
        return key

    got = []
    with pytest.raises(KeyError) as caught, prefetch(prepare, range(5), depth) as items:
        for item in items:
            got.append(item)
    assert got == [0, 1]
    assert "a place in prepare" in "".join(traceback.format_exception(caught.value))
    assert "in prepare" in "".join(traceback.format_tb(caught.value.__traceback__))


def test_an_exception_in_the_keys_reaches_the_consumer():
    def keys():
        yield 1
        raise ValueError("no more keys")

    with pytest.raises(ValueError, match="no more keys"), prefetch(lambda key: key, keys(), 2) as items:
        assert next(items) == 1
        next(items)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_exactly_depth_items_are_begun_ahead(depth):
    begun = []
    with prefetch(lambda key: begun.append(key) or key, range(100), depth) as items:
        for taken in range(1, 6):
            next(items)
            eventually(lambda taken=taken: len(begun) == taken + depth)
    assert len(begun) == 5 + depth


def test_breaking_out_leaves_the_same_number_begun_whatever_the_speed():
    """What a collective `prepare` needs: ranks that stop after the same item have begun the same number of items."""
    for slow in (0.0, 0.02):
        begun = []

        def prepare(key, slow=slow, begun=begun):
            begun.append(key)
            threading.Event().wait(slow)
            return key

        with prefetch(prepare, range(100), 3) as items:
            for item in items:
                if item == 4:
                    break
        assert begun == list(range(8))


def test_an_exception_in_the_consumer_stops_the_thread_at_once():
    begun, release = [], threading.Event()

    def prepare(key):
        begun.append(key)
        if key == 1:
            release.wait(10)
        return key

    with pytest.raises(RuntimeError, match="out of luck"), prefetch(prepare, range(100), 5) as items:
        assert next(items) == 0
        eventually(lambda: begun == [0, 1])
        threading.Timer(0.05, release.set).start()
        raise RuntimeError("out of luck")
    assert begun == [0, 1]


def test_a_thread_that_does_not_stop_is_an_error_with_a_deadline():
    release = threading.Event()
    items = prefetch(lambda key: release.wait(30), range(3), 1, close_timeout_s=0.05)
    with pytest.raises(ExchangeError, match="did not stop within 0.05 s"):
        items.close()
    with pytest.raises(RuntimeError, match="the real one") as caught, items:
        raise RuntimeError("the real one")
    assert "did not stop" in caught.value.__notes__[0]
    release.set()
    items.close()
    with pytest.raises(StopIteration):
        next(items)


def test_an_error_nobody_took_is_raised_by_close():
    def prepare(key):
        if key == 2:
            raise OSError("made ahead")
        return key

    with pytest.raises(OSError, match="made ahead"), prefetch(prepare, range(9), 2) as items:
        next(items)


def test_waiting_is_measured_per_item():
    gate = threading.Event()

    def prepare(key):
        if key == 1:
            gate.wait(10)
        return key

    with prefetch(prepare, range(2), 1) as items:
        next(items)
        first = items.waited_s
        threading.Timer(0.1, gate.set).start()
        next(items)
        assert items.waited_s > 0.05
        assert items.total_waited_s == pytest.approx(first + items.waited_s)


def test_a_negative_depth_is_refused():
    with pytest.raises(ValueError, match="depth"):
        prefetch(str, [], -1)
