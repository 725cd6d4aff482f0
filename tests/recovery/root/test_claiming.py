"""The claim of a term: won, refused, and on a file system that fails. No sleeping: each wait has a deadline."""

from __future__ import annotations

import errno
import threading
import time

import pytest

from gemini_gnn.observe import terms
from gemini_gnn.recovery.root import claiming
from gemini_gnn.recovery.root.claiming import Claim

PATIENCE_S = 30.0
ELSEWHERE = {"boot": "another machine's", "machine": "h1", "owner": "the worker agent on h1, pid 7"}


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    terms.make_run_dir(tmp_path)
    (tmp_path / "failures.jsonl").write_text('{"kind": "silent"}\n')
    (tmp_path / "status.json").write_text('{"step": 7}')
    monkeypatch.setattr(claiming, "AGAIN_S", 0.01)
    monkeypatch.setattr(terms, "PATIENCE", 0.05)  # beats, of 2 s
    return tmp_path


@pytest.fixture
def claim(run_dir):
    made = []

    def make(term=1, witness=True, before=None, fence_s=0.0):
        made.append(Claim(run_dir, term, {"start": "s"}, witness, before, fence_s))
        return made[-1]

    yield make
    for one in made:
        one.give_up()


def result_of(claim):
    wait_for(lambda: claim.result is not None, "a result")
    return claim.result


def wait_for(condition, what):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


def test_a_claim_is_won_with_all_that_the_run_directory_says(run_dir, claim):
    assert terms.claim_term(run_dir, {}) == 1
    won = result_of(claim()).won
    assert (won.term, won.failures, won.status["step"]) == (2, [{"kind": "silent"}], 7)
    assert not won.beats.lost and terms.newest_term(run_dir)["start"] == "s"


def test_a_root_that_has_a_term_leaves_it_for_the_next(run_dir, claim):
    before = terms.Beats(run_dir, terms.claim_term(run_dir, {}))
    assert result_of(claim(before=before)).won.term == 2
    assert (run_dir / "terms" / "1.beat").read_text().strip() == terms.OVER


def test_a_claim_is_refused_and_names_who_has_the_term(run_dir, claim):
    assert terms.claim_term(run_dir, {}) == 1
    assert terms.succeed(run_dir, 1, {"port": 7}, "nonce")
    refused = result_of(claim())
    assert refused.won is None and (refused.holder["term"], refused.holder["port"]) == (2, 7)


@pytest.mark.parametrize("lives", [True, False])
def test_without_a_witness_the_last_holder_is_watched_first(run_dir, claim, lives):
    (run_dir / "terms" / "1.json").write_text('{"term": 1, "machine": "h1"}')
    (run_dir / "terms" / "1.beat").write_text("1")
    beats = terms.Beats(run_dir, 1, 0.01) if lives else None
    made = result_of(claim(witness=False))
    if beats is not None:
        beats.stop()
        assert made.won is None and made.holder["term"] == 1
    else:
        assert made.won.term == 2


def test_without_a_witness_a_root_with_a_term_gives_its_own_trainers_time_to_end(run_dir, claim):
    before = terms.Beats(run_dir, terms.claim_term(run_dir, {}))
    begin = time.monotonic()
    assert result_of(claim(witness=False, before=before, fence_s=0.3)).won.term == 2
    assert time.monotonic() - begin >= 0.3


@pytest.mark.parametrize("witness", [True, False])
def test_a_file_system_that_fails_is_asked_again_and_is_no_refusal(run_dir, claim, monkeypatch, witness):
    before = terms.Beats(run_dir, terms.claim_term(run_dir, {}))
    before.stop()
    failed, whole = [], terms.create

    def fails(*arguments):
        failed.append(1)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(terms, "create", fails)
    made = claim(witness=witness)
    wait_for(lambda: len(failed) > 3, "attempts")
    assert made.result is None
    monkeypatch.setattr(terms, "create", whole)
    assert result_of(made).won.term == 2


def test_a_claim_that_was_given_up_ends_and_a_term_that_comes_late_is_left(run_dir, claim, monkeypatch):
    assert terms.claim_term(run_dir, {}) == 1
    hangs, go_on, whole = threading.Event(), threading.Event(), terms.create

    def hang(*arguments):
        hangs.set()
        assert go_on.wait(PATIENCE_S)
        return whole(*arguments)

    monkeypatch.setattr(terms, "create", hang)
    made = claim()
    assert hangs.wait(PATIENCE_S)
    made.give_up()
    go_on.set()
    assert result_of(made).won.term == 2
    beat = run_dir / "terms" / "2.beat"
    wait_for(lambda: beat.read_text().strip() == terms.OVER, "the end of a term that nobody uses")


def test_a_claim_that_is_given_up_while_the_file_system_fails_ends(run_dir, claim, monkeypatch):
    terms.claim_term(run_dir, {})
    monkeypatch.setattr(terms, "create", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "no")))
    made = claim()
    made.give_up()
    assert result_of(made).won is None
