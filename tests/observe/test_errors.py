"""The errors of a job: the cause is read, whatever else was raised because of it."""

import os

import pytest

from gemini_gnn.errors import ClusterError, ExchangeError, PeerLost, RunDirError
from gemini_gnn.observe import errors
from gemini_gnn.observe.errors import Record, first, first_error, first_exit_code, is_consequence, read_errors


@pytest.fixture(autouse=True)
def no_membership():
    yield
    errors.begin("")


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.1.2.3]:31413"),
        RuntimeError("Timed out waiting 20000ms for recv operation to complete"),
        caused(RunDirError("rank 0 could not finish 'claim run_dir': in use"), PeerLost("its error is the cause")),
        PeerLost("rank 0: rank 1 failed while preparing rows"),
        caused(ExchangeError("halo exchange of step 3 failed"), RuntimeError("Connection reset by peer")),
    ],
)
def test_errors_that_only_say_another_rank_is_gone(error):
    assert is_consequence(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory"),
        ValueError("expected a connection closed by a bracket"),
        FileNotFoundError("no such file"),
        KeyError("timeout"),
        ClusterError("no network interface leads there: timed out"),  # our own words are not searched
    ],
)
def test_errors_that_are_causes(error):
    assert not is_consequence(error)


def record(rank, consequence, at=0.0, expected=False, membership="1.1"):
    return Record(
        membership=membership,
        rank=rank,
        machine=f"h{rank}",
        time_s=at,
        type="RuntimeError" if consequence else "ValueError",
        message="Connection closed by peer" if consequence else "bad value",
        traceback="Traceback: ...",
        consequence=consequence,
        expected=expected,
    )


def test_the_cause_counts_before_its_consequences_whatever_the_clocks_say():
    assert first([]) is None
    assert first([record(0, True, 1.0), record(1, False, 5.0), record(2, False, 9.0)]).rank == 1
    assert first([record(0, True, 2.0), record(3, True, 1.0)]).rank == 3


def test_records_of_ranks(tmp_path):
    assert first_error(tmp_path) is None
    errors.record_error(tmp_path, 0, RuntimeError("Connection closed by peer"))
    try:
        raise ValueError("no such label")
    except ValueError as error:
        errors.record_error(tmp_path, 3, error)
    (tmp_path / "errors" / "rank-1.json").write_text('{"cut o')
    machine = os.uname().nodename
    assert first_error(tmp_path) == f"rank 3 on {machine}: ValueError: no such label"
    assert [r.rank for r in read_errors(tmp_path)] == [0, 3]
    assert "raise ValueError" in read_errors(tmp_path)[1].traceback
    errors.forget_errors(tmp_path)
    assert first_error(tmp_path) is None


def test_a_run_directory_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "errors").write_text("a file where the folder should be")
    errors.record_error(tmp_path, 0, ValueError("x"))
    assert "warning: cannot write" in capsys.readouterr().err


def test_every_rank_ends_with_the_code_of_the_first_error(tmp_path):
    """Whichever rank a launcher sees end first."""
    lost = PeerLost("rank 0: rank 1 failed while preparing rows")  # for users, and no cause
    errors.record_error(tmp_path, 1, KeyError("a bug"))
    assert [first_exit_code(tmp_path, rank, 2, error) for rank, error in enumerate((lost, KeyError("a bug")))] == [1, 1]
    errors.forget_errors(tmp_path)
    errors.record_error(tmp_path, 1, ClusterError("no such interface"))
    assert first_exit_code(tmp_path, 0, 2, RuntimeError("Connection closed by peer")) == 2
    errors.forget_errors(tmp_path)
    assert first_exit_code(tmp_path, 0, 2, lost, settle_s=0) == 2


def test_an_error_of_an_earlier_start_is_not_todays_cause(tmp_path):
    """Joining fails before rank 0 could forget what an earlier start had left."""
    errors.begin("1.1")
    errors.record_error(tmp_path, 1, ValueError("of yesterday"))
    errors.begin("2.1")
    assert first_exit_code(tmp_path, 0, 2, PeerLost("rank 1 did not come"), settle_s=0) == 2
    errors.record_error(tmp_path, 1, ValueError("of today"))
    assert first_exit_code(tmp_path, 0, 2, PeerLost("rank 1 did not come"), settle_s=0) == 1
