"""How many tokens a row takes in is checked before anything is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from statecache.cache import Rings
from statecache.errors import StateCacheError
from statecache.spec import LayerSpec, ModelSpec, StateSpec

KEY = StateSpec("key", "attention", (1, 1), None, axis=1)
OUT_OF_RANGE: dict[str, tuple[int, Any]] = {
    "fewer than none and more than came": (1, [-3, 7]),
    "fewer than none": (4, [-1, 2]),
    "one more than came": (2, [2, 3]),
    "more than none of none": (0, [0, 1]),
    "a row too few": (2, [1]),
    "a row too many": (2, [1, 1, 1]),
    "no rows": (2, []),
    "a table": (2, [[1, 1]]),
    "fractions": (2, [1.0, 2.0]),
    "truth values": (2, [True, False]),
}


def states(capacity: int | None, slack: int) -> Any:
    spec = ModelSpec((LayerSpec(0, "test", (KEY,)),))
    made = Rings(spec, capacity=capacity, slack=slack, rows=2, dtype=torch.float32, device="cpu")
    made.close(made.open(4))
    return made


@pytest.mark.parametrize("given", [torch.tensor, list], ids=["tensor", "list"])
@pytest.mark.parametrize("slack", [0, 3])
@pytest.mark.parametrize("capacity", [None, 16], ids=["growing", "fixed"])
@pytest.mark.parametrize("case", OUT_OF_RANGE)
def test_counts_that_do_not_fit_the_pass_are_refused_and_change_nothing(
    case: str, capacity: int | None, slack: int, given: Any
) -> None:
    tokens, count = OUT_OF_RANGE[case]
    subject = states(capacity, slack)
    before = [buffer.clone() for buffer in subject.buffers()]
    with pytest.raises(StateCacheError):
        subject.open(tokens, given(count))
    assert all(torch.equal(a, b) for a, b in zip(subject.buffers(), before, strict=True))
    assert subject.capabilities["step"]
    subject.close(subject.open(1))
    assert subject.lengths.tolist() == [5, 5]


@pytest.mark.parametrize("tokens", [-1, 1.0, True, "1", None])
def test_a_pass_of_no_number_of_tokens_is_refused(tokens: Any) -> None:
    subject = states(None, 0)
    with pytest.raises(StateCacheError):
        subject.open(tokens)
    assert subject.lengths.tolist() == [4, 4]


@pytest.mark.parametrize("given", [torch.tensor, list], ids=["tensor", "list"])
@pytest.mark.parametrize("capacity", [None, 16], ids=["growing", "fixed"])
def test_counts_within_the_pass_are_taken_as_a_list_or_a_tensor(capacity: int | None, given: Any) -> None:
    subject = states(capacity, 2)
    subject.close(subject.open(3, given([0, 3])))
    subject.close(subject.open(0, given([0, 0])))
    assert subject.lengths.tolist() == [4, 7]


def test_the_refusal_names_the_row_what_came_and_what_could() -> None:
    with pytest.raises(StateCacheError, match=r"row 1.*7.*0\.\.2"):
        states(None, 0).open(2, torch.tensor([1, 7]))
