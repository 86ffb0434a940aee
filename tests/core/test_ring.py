"""What a ring does, in cases small enough to read: C = 4 slots, of a window of 3 and a slack of 1.

An entry is a letter, and a dot is none: the entry of position p lies in slot p % 4.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import statecache.ring
from statecache.ring import Ring
from statecache.spec import StateSpec
from statecache.step import Allocation, Landing, Step
from statecache.storage.changes import Changes
from statecache.storage.dense import Dense
from statecache.storage.paged import Paged

WINDOW, SLACK = 3, 1


def ring(*held: str, window: int | None = WINDOW, tokens: int = 0, store: type = Dense) -> Ring:
    """A ring whose rows took these in, one letter at a time."""
    room = Allocation(max(1, len(held)), None, SLACK, torch.float32, torch.device("cpu"), store)
    made = Ring(StateSpec("state", "sliding", (), window), room, tokens)
    for row, entries in enumerate(held):
        for position, entry in enumerate(entries):
            made.put(letters(entry), Step(1, torch.tensor([position]), rows=torch.tensor([row]), end=position + 1))
    return made


def letters(*rows: str) -> Tensor:
    """(B, T), a number a letter."""
    return torch.tensor([[0.0 if entry == "." else float(ord(entry)) for entry in row] for row in rows])


def read(entries: Tensor) -> list[str]:
    return ["".join(chr(int(n)) if n else "." for n in row) for row in entries.tolist()]


def slots(of: Ring) -> list[str]:
    return read(of.store.read(slice(0, of.capacity)))


@pytest.fixture(params=[False, True], ids=["host", "device"])
def on_device(request: pytest.FixtureRequest) -> bool:
    """Whether the device alone knows where rows stand."""
    return bool(request.param)


def step(tokens: int, start: int, on_device: bool) -> Step:
    return Step(tokens, torch.tensor([start]) if on_device else start, end=start + tokens)


PUT = [
    # held    new       slots afterwards
    ("", "a", "a..."),
    ("a", "bc", "abc."),
    ("abc", "d", "abcd"),
    ("abcd", "e", "ebcd"),  # the ring goes round
    ("abc", "de", "ebcd"),  # in two runs
    ("abcd", "efgh", "efgh"),
    ("abc", "defghi", "ifgh"),  # a chunk longer than the ring: its last four
    ("abc", "", "abc."),
]


@pytest.mark.parametrize(("held", "new", "after"), PUT)
@pytest.mark.parametrize("store", [Dense, Paged])
def test_put_writes_position_p_into_slot_p_modulo_c(
    held: str, new: str, after: str, store: type, on_device: bool
) -> None:
    state = ring(held, store=store)
    state.put(letters(new), step(len(new), len(held), on_device))
    assert slots(state) == [after]


PAST = [
    # held      n  the n before the step
    ("", 2, ".."),
    ("a", 2, ".a"),
    ("abc", 2, "bc"),
    ("abcde", 3, "cde"),
    ("abcde", 4, "bcde"),
    ("abcde", 0, ""),
]


@pytest.mark.parametrize(("held", "n", "seen"), PAST)
def test_past_is_the_entries_before_the_step_and_zero_before_the_first(
    held: str, n: int, seen: str, on_device: bool
) -> None:
    assert read(ring(held).past(n, step(1, len(held), on_device))) == [seen]


EXTEND = [
    # held    new       what its tokens may attend to, the first through a window of 3
    ("", "a", "a"),
    ("a", "b", "ab"),
    ("ab", "c", "abc"),
    ("abcd", "e", "cde"),
    ("abcd", "ef", "cdef"),
    ("abcd", "efghij", "cdefghij"),  # though the ring now holds ghij
]


@pytest.mark.parametrize(("held", "new", "seen"), EXTEND)
def test_extend_puts_and_returns_the_window_and_the_new_entries(
    held: str, new: str, seen: str, on_device: bool
) -> None:
    state = ring(held)
    got = state.extend(letters(new), step(len(new), len(held), on_device))
    assert got.shape == (1, WINDOW - 1 + len(new)), "one shape for every length; what lies behind the end is hidden"
    assert read(got[:, : len(seen)]) == [seen]
    assert read(state.past(4, step(0, len(held + new), on_device))) == [("...." + held + new)[-4:]]


def test_extend_without_a_window_returns_the_whole_ring_or_what_it_holds(on_device: bool) -> None:
    state = ring("ab", window=None)
    assert read(state.extend(letters("c"), step(1, 2, on_device))) == ["abc".ljust(state.capacity, ".")]
    assert read(state.extend(letters("d"), step(1, 3, on_device), exact=True)) == ["abcd"]


GROWTH = [
    # window  slots after a first step of one token, and when there must be room for 3, 4, 6, 7 and 20
    (None, [3, 3, 6, 6, 12, 24]),  # at least twice as many
    (WINDOW, [3, 3, 4, 4, 4, 4]),  # never more than it needs
]


@pytest.mark.parametrize(("window", "grows"), GROWTH)
def test_a_ring_grows_by_doubling_and_entries_keep_their_slots(
    window: int | None, grows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statecache.ring, "FIRST_SLOTS", 2)
    state = ring("abc", window=window, tokens=1)
    had = []
    for end in (1, 3, 4, 6, 7, 20):
        state.reserve(end)
        had.append(state.capacity)
    assert had == grows
    assert slots(state) == ["abc".ljust(grows[-1], ".")]


BACK = [
    # held     forget  the three before
    ("abcd", 0, "bcd"),
    ("abcd", 1, "abc"),
    ("abcde", 1, "bcd"),
    ("abcde", 2, "ebc"),  # past the slack: e has taken the slot of a
]


@pytest.mark.parametrize(("held", "forget", "seen"), BACK)
def test_a_rollback_moves_no_entry_and_slack_is_how_far_it_reads_true(
    held: str, forget: int, seen: str, on_device: bool
) -> None:
    assert read(ring(held).past(3, step(0, len(held) - forget, on_device))) == [seen]


RAGGED = [
    # of two rows that hold abc and pqrst, how many each takes in of its new tokens; slots afterwards
    ("d", "u", [1, 0], ["abcd", "tqrs"]),
    ("d", "u", [0, 1], ["abc.", "turs"]),
    ("d..", "uvw", [1, 3], ["abcd", "tuvw"]),
    ("def...", "uvwxyz", [3, 6], ["efcd", "xyzw"]),  # longer than the ring: the last four that a row takes in
]


@pytest.mark.parametrize(("new", "other", "count", "after"), RAGGED)
@pytest.mark.parametrize("store", [Dense, Paged])
def test_each_row_takes_in_the_first_of_its_tokens_and_no_padding(
    new: str, other: str, count: list[int], after: list[str], store: type
) -> None:
    state = ring("abc", "pqrst", store=store)
    state.put(letters(new, other), Step(len(new), torch.tensor([3, 5]), torch.tensor(count), end=11))
    assert slots(state) == after


ROWS = [
    # which rows of abc, pqr and xyz, in which order; their new tokens; slots afterwards
    ([1], ["s"], ["abc.", "pqrs", "xyz."]),
    ([2, 0], ["1", "d"], ["abcd", "pqr.", "xyz1"]),
    ([2, 0], ["12", "de"], ["ebcd", "pqr.", "2yz1"]),
]


@pytest.mark.parametrize(("rows", "new", "after"), ROWS)
@pytest.mark.parametrize("store", [Dense, Paged])
def test_a_pass_over_some_rows_leaves_the_others(
    rows: list[int], new: list[str], after: list[str], store: type
) -> None:
    state = ring("abc", "pqr", "xyz", store=store)
    held = [("abc", "pqr", "xyz")[row] for row in rows]
    tokens = len(new[0])
    passing = Step(tokens, torch.tensor([3] * len(rows)), rows=torch.tensor(rows), end=3 + tokens)
    assert read(state.past(2, passing)) == [row[-2:] for row in held]
    state.put(letters(*new), passing)
    assert slots(state) == after


VALUES = [
    # held      a row as a value; the slots of an empty row that it is put into
    ("", "", "...."),
    ("ab", "ab", "ab.."),
    ("abcdef", "def", "ef.d"),  # as many as the window, at the slots of their positions
]


@pytest.mark.parametrize(("held", "value", "after"), VALUES)
def test_a_row_as_a_value_is_its_window_in_order(held: str, value: str, after: str) -> None:
    entries, other = ring(held).row(0, len(held)), ring("")
    assert read(entries[None]) == [value]
    if held:
        changes = Changes()
        other.admit(entries, Landing(0, len(held), torch.device("cpu")), changes)
        changes.make()
    assert slots(other) == [after]
