"""States in host memory are those of a cache that keeps them on the device, and only what is in use is there."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest
import torch

from statecache import errors, offload, ring
from statecache.offload import Offloaded
from statecache.ring import Ring
from statecache.spec import LayerSpec, ModelSpec, StateSpec
from statecache.states import States
from statecache.step import Step

LAYERS, WINDOW, ROWS = 4, 5, 2
SPEC = ModelSpec(
    tuple(
        LayerSpec(
            n,
            "test",
            (
                StateSpec("key", "attention", (2, 3), None, axis=1),
                StateSpec("near", "sliding", (3,), WINDOW),
                StateSpec("copied", "recurrent", (3,), 1, leased=True),
            ),
        )
        for n in range(LAYERS)
    )
)


@pytest.fixture(params=[False, True], ids=["one", "and the next"], autouse=True)
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(offload, "AHEAD", request.param)
    return request.param


@pytest.fixture(autouse=True)
def parts_go_back_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALL", 0)
    monkeypatch.setattr(offload, "SOON", 0)


@pytest.fixture
def pair() -> list[States]:
    """Two containers, of which the first is offloaded."""
    return [States(SPEC, slack=3, rows=ROWS, dtype=torch.float32, device="cpu", offload=on) for on in (True, False)]


def feed(states: States, tokens: int, layers: Any = range(LAYERS), count: Any = None, seed: int = 0) -> None:
    """A pass through these layers, the same for the same seed."""
    random = torch.Generator().manual_seed(seed)
    step = states.open(tokens, count)
    for n in layers:
        feed_layer(states, n, step, random)
    states.close(step)


def feed_layer(states: States, n: int, step: Step, random: torch.Generator) -> None:
    """Every state of a layer takes in tokens."""
    states[f"{n}.key"].extend(torch.randn(ROWS, 2, step.tokens, 3, generator=random), step, exact=True)
    states[f"{n}.near"].extend(torch.randn(ROWS, step.tokens, 3, generator=random), step)
    lease = states[f"{n}.copied"]
    lease.keep(step)
    lease.write(torch.randn(ROWS, 3, generator=random), step)


def same(pair: list[States]) -> None:
    """Every buffer of the first is that of the second."""
    offloaded, plain = pair
    assert list(offloaded) == list(plain)
    for name in plain:  # so that each has been away
        assert offloaded[name].spec == plain[name].spec
    for name in plain:
        for mine, other in zip(offloaded[name].buffers(), plain[name].buffers(), strict=True):
            assert torch.equal(mine, other), name


def there(states: States) -> list[int]:
    """The layers that have memory on the device."""
    held = dict.items(states.held)
    return sorted({int(n.split(".")[0]) for n, s in held for b in s.buffers() if b.untyped_storage().nbytes()})


def test_only_the_layer_in_use_and_the_next_are_there(pair: list[States], ahead: bool) -> None:
    offloaded, _ = pair
    for seed in range(2):  # which layer follows is known after the first pass
        feed(offloaded, 3, seed=seed)
    for n in range(LAYERS):
        assert offloaded[f"{n}.key"].spec.name == "key"
        assert there(offloaded) == (sorted([n, (n + 1) % LAYERS]) if ahead else [n])


def test_passes_of_any_length_are_the_same(pair: list[States]) -> None:
    for seed, tokens in enumerate([7, 1, 1, 80, 1, 3, 1, 1, 1, 200, 1]):  # grows twice, and goes round the windows
        for states in pair:
            feed(states, tokens, seed=seed)
    same(pair)


@pytest.mark.parametrize(("store", "bytes_"), [("int8", 8), ("fp8", 9)])
def test_codes_in_as_many_slots_as_they_have_bytes_come_back(
    store: str, bytes_: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "FIRST_SLOTS", bytes_)
    turned = StateSpec("key", "attention", (8,), axis=1)  # positions stand behind the numbers
    spec = ModelSpec(tuple(LayerSpec(n, "test", (turned,)) for n in range(2)))
    pair = [States(spec, rows=1, dtype=torch.float32, device="cpu", store=store, offload=on) for on in (True, False)]
    entries = torch.randn(1, 8, bytes_, generator=torch.Generator().manual_seed(0))
    for states in pair:
        for one in entries.split(1, -1):
            step = states.open(1)
            seen = [states[name].extend(one, step, exact=True) for name in ("0.key", "1.key")]
            states.close(step)
        assert states["0.key"].capacity == bytes_
        assert torch.equal(*seen) and bool((seen[0] - entries).abs().max() < 1 / 8)
    same(pair)


def test_states_that_come_with_their_first_write_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "_host", lambda buffer: torch.full_like(buffer, torch.nan))
    pair = [States(SPEC, slack=3, offload=on) for on in (True, False)]
    for states in pair:
        states.clock_for(ROWS, torch.device("cpu"))
        step = states.open(2)
        for name in states.declared:
            states.allocate(name, torch.float32, torch.device("cpu"), 2)
        states.close(step)
        feed(states, 1)
    same(pair)


def test_rows_at_their_own_pace_are_the_same(pair: list[States]) -> None:
    for seed, count in enumerate([[7, 2], [1, 0], [1, 1], [0, 1], [3, 1]]):
        for states in pair:
            feed(states, max(count), count=count, seed=seed)
    same(pair)


@pytest.mark.parametrize("last", range(LAYERS))
@pytest.mark.parametrize(
    "change",
    [
        lambda s, mark: s.reset([1]),
        lambda s, mark: s.restore(mark),
        lambda s, mark: s.rollback(2),
        lambda s, mark: s.gather([1, 0]),
        lambda s, mark: s.gather([1, 1, 0]),
        lambda s, mark: s.admit(1, s.snapshot(0)),
        lambda s, mark: s.reset(),
    ],
    ids=["reset a row", "restore", "rollback", "gather", "gather more", "admit", "reset"],
)
def test_what_changes_between_passes_is_the_same(pair: list[States], change: Callable[..., None], last: int) -> None:
    order = [n for n in range(LAYERS) if n != last] + [last]  # of which the last is still there when rows change
    for states in pair:
        feed(states, 9, order)
        mark = states.checkpoint()
        for seed in (1, 2, 3):
            feed(states, 1, order, seed=seed)
        change(states, mark)
    same(pair)


def test_passes_over_one_layer_while_it_stays(pair: list[States]) -> None:
    for states in pair:
        feed(states, 4)
        for seed in (1, 2):
            feed(states, 2, [0], seed=seed)
    same(pair)


def test_a_step_takes_back_what_it_wrote_alone(pair: list[States], monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[int] = []
    plainly = offload._copy

    def counted(to: torch.Tensor, what: torch.Tensor) -> None:
        copies.append(what.numel())
        plainly(to, what)

    for seed in range(3):
        feed(pair[0], 40 if seed == 0 else 1, seed=seed)
    same(pair[:1] * 2)
    monkeypatch.setattr(offload, "_copy", counted)
    feed(pair[0], 1, seed=4)
    moved = sum(copies)
    whole = sum(buffer.numel() for buffer in pair[0].buffers())
    entries = ROWS * LAYERS * (2 * 2 * 3 + 2 * 3 + 3 + 2 * 3)  # of a token and the one before, and the lease's
    assert whole / 2 < moved < whole + 2 * entries  # half of it, where the next layer is there already


def test_what_a_kernel_overwrites_without_a_word_comes_back(pair: list[States]) -> None:
    for states in pair:
        feed(states, 2)
        states["1.copied"].entry.data.fill_(7.0)  # which torch does not count
    same(pair)


@pytest.mark.parametrize(
    "copied",
    [States.fork, copy.deepcopy, lambda states: pickle.loads(pickle.dumps(states))],
    ids=["fork", "deepcopy", "pickle"],
)
def test_copies_are_whole_and_apart(pair: list[States], copied: Callable[[States], States], ahead: bool) -> None:
    for states in pair:
        feed(states, 6)
    others = [copied(states) for states in pair]
    for states in pair:
        feed(states, 3, seed=1)
    same(pair)
    same(others)
    for states in others:
        feed(states, 5, seed=2)
    same(others)
    assert len(there(others[0])) == 1 + ahead
    same(pair)


def test_small_buffers_go_back_as_they_are(pair: list[States], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALL", 1 << 20)
    monkeypatch.setattr(offload, "_parts", lambda *_: pytest.fail("a part was copied"))
    for seed in range(3):
        for states in pair:
            feed(states, 1, seed=seed)
    same(pair)


def test_what_is_of_no_layer_stays() -> None:
    spec = ModelSpec(SPEC.layers, "test", own=(StateSpec("place", "position", (1,), 1, dtype=torch.long),))
    states = States(spec, slack=3, rows=ROWS, dtype=torch.float32, device="cpu", offload=True)
    feed(states, 3)
    for kept in (states, pickle.loads(pickle.dumps(states))):
        feed(kept, 1)
        assert all(buffer.untyped_storage().nbytes() for buffer in kept["place"].buffers())


def test_a_name_that_is_none_changes_nothing(pair: list[States]) -> None:
    for states in pair:
        feed(states, 3)
        with pytest.raises(KeyError):
            states["9.key"]
        feed(states, 1, seed=1)
    same(pair)


def test_a_copy_that_fails_is_made_again(pair: list[States], monkeypatch: pytest.MonkeyPatch) -> None:
    for states in pair:
        feed(states, 4)
        feed(states, 1, seed=1)
    plainly, offloaded = offload.Home.back, pair[0]

    def fail(home: offload.Home) -> None:
        if home.parts:
            raise RuntimeError("no memory")
        plainly(home)

    with monkeypatch.context() as patch:
        patch.setattr(offload.Home, "back", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            feed(offloaded, 1, seed=2)
    for states in pair:
        states.reset()
        feed(states, 4, seed=3)
    same(pair)
    assert not any(home.parts for homes in offloaded.held._homes.values() for home in homes if home.version is None)


def test_bytes_are_counted_wherever_they_are(pair: list[States]) -> None:
    for states in pair:
        feed(states, 70)
    assert pair[0].nbytes() == pair[1].nbytes()


# ---- streams, of which a CPU has none


class Stream:
    """A queue of a device that says of each piece of work which others were over before it."""

    device = torch.device("cpu")
    recorded = 0  # events, of all streams

    def __init__(self) -> None:
        self.before: set[object] = set()

    def work(self) -> tuple[object, set[object]]:
        """A new piece of work, and all that is over when it begins."""
        made, before = object(), set(self.before)
        self.before.add(made)
        return made, before

    def record_event(self) -> Stream:
        Stream.recorded += 1
        event = Stream()
        event.before = set(self.before)
        return event

    def wait_event(self, event: Stream) -> None:
        self.before |= event.before

    wait_stream = wait_event


def memory(tensor: torch.Tensor) -> int:
    """What says which piece of memory it is."""
    return tensor.untyped_storage()._cdata


class Streams:
    """Stands in for CUDA's streams in `offload`, and checks the order of everything that touches a piece of memory."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = self.compute = Stream()
        self.made: dict[bool, Stream] = {}
        self.last: dict[int, list[object]] = {}  # what touched each piece of memory, on the device or the host
        self.checked = self.freed = 0
        patch.setattr(torch.cuda, "current_device", lambda: None)
        patch.setattr(torch.cuda, "current_stream", lambda device: self.now)
        patch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "now", stream))
        patch.setattr(Offloaded, "_stream", lambda _, device, back: self.made.setdefault(back, Stream()))
        self.kept: set[int] = set()  # memory that the allocator keeps for more streams than the one that it is of
        self.owners: dict[int, Stream] = {}
        patch.setattr(torch.Tensor, "record_stream", lambda buffer, _: self.kept.add(memory(buffer)))
        copied, filled, emptied = offload._copy, offload._fill, offload._empty
        patch.setattr(offload, "_copy", lambda to, what: (self.touch(to, what), copied(to, what)))
        patch.setattr(offload, "_fill", lambda buffer: (self.fill(buffer), filled(buffer)))
        patch.setattr(offload, "_empty", lambda buffer: (self.empty(buffer), emptied(buffer)))

    def touch(self, *tensors: torch.Tensor) -> None:
        """Work on these tensors, in this stream, begins when all before on any of them is over."""
        work, before = self.now.work()
        for tensor in tensors:
            used = self.last.setdefault(memory(tensor), [])
            assert before.issuperset(used), "two streams touch one piece of memory at a time"
            self.checked += len(used)
            used.append(work)

    def fill(self, buffer: torch.Tensor) -> None:
        """Memory that the layers' stream may have used until now."""
        assert self.now is self.compute
        self.owners[memory(buffer)] = self.compute
        self.last[memory(buffer)] = list(self.compute.before)

    def empty(self, buffer: torch.Tensor) -> None:
        """From now on the stream that the memory is of may use it for something else."""
        assert self.now is self.compute
        used, owner = self.last.pop(memory(buffer), []), self.owners.get(memory(buffer), self.compute)
        assert memory(buffer) in self.kept or owner.before.issuperset(used), "a copy uses memory that is freed"
        self.freed += len(used)

    def go_on_in_another(self) -> None:
        """As who passes in another stream has to, that waits for this one."""
        other = Stream()
        other.before = set(self.compute.before)
        self.now = self.compute = other

    def flying(self, states: States) -> int:
        """How much work on the states' memory the layers' stream has not waited for."""
        buffers = [b for state in dict.values(states.held) for b in state.buffers() if b.untyped_storage().nbytes()]
        used = {work for b in buffers for work in self.last.get(memory(b), [])}
        return len(used - self.compute.before)


ORDERS = ["0123", "0123", "0123", "0231", "1203", "00", "2130", "0123", "0123"]


def fly(states: States, streams: Streams, orders: Sequence[str] = ORDERS) -> None:
    """Passes in which each layer reads and writes its states, through some layers in another order than before."""
    for seed, order in enumerate(orders):
        step = states.open(3)
        for n in map(int, order):
            for name in ("key", "near", "copied"):
                state = states[f"{n}.{name}"]
                assert streams.now is streams.compute
                streams.touch(*state.buffers())
            feed_layer(states, n, step, torch.Generator().manual_seed(seed))
        states.close(step)


@pytest.mark.parametrize("soon", [0, 100, 300])
def test_no_two_streams_touch_the_same_memory_at_a_time(
    pair: list[States], monkeypatch: pytest.MonkeyPatch, soon: int
) -> None:
    monkeypatch.setattr(offload, "SOON", soon)
    streams = Streams(monkeypatch)
    fly(pair[0], streams)
    assert streams.checked > 100 and streams.freed > 100 and len(streams.made) == 2
    assert not streams.kept  # which takes memory anew while the old is not free


@pytest.mark.parametrize("soon", [0, 300])
def test_passes_in_another_stream_are_in_order_too(
    pair: list[States], monkeypatch: pytest.MonkeyPatch, soon: int
) -> None:
    monkeypatch.setattr(offload, "SOON", soon)
    streams = Streams(monkeypatch)
    for orders in (ORDERS, ORDERS, ["012", "012"], ["012", "012"], ["012", "012"]):
        fly(pair[0], streams, orders)
        streams.go_on_in_another()
    assert streams.kept


@pytest.mark.parametrize(
    "end", [lambda states: states.held.clear(), lambda states: states.held.__del__()], ids=["forgotten", "dropped"]
)
def test_memory_that_others_may_get_is_no_copys(
    pair: list[States], monkeypatch: pytest.MonkeyPatch, end: Callable[[States], None]
) -> None:
    streams = Streams(monkeypatch)
    fly(pair[0], streams)
    assert streams.flying(pair[0]) > 0
    held = dict(dict.items(pair[0].held))  # so that the memory is still to be seen
    end(pair[0])
    for state in held.values():
        for buffer in state.buffers():
            used = streams.last.get(memory(buffer), [])
            assert streams.compute.before.issuperset(used)


@pytest.mark.parametrize("streams", [False, True], ids=["at once", "in streams"])
def test_small_layers_come_before_a_large_one_is_needed(monkeypatch: pytest.MonkeyPatch, streams: bool) -> None:
    monkeypatch.setattr(offload, "AHEAD", True)
    if streams:
        Streams(monkeypatch)
    wide = [1, 1, 1, 8] * 3
    spec = ModelSpec(
        tuple(LayerSpec(n, "test", (StateSpec("s", "recurrent", (w * 8,), 1),)) for n, w in enumerate(wide))
    )
    states = States(spec, rows=ROWS, dtype=torch.float32, device="cpu", offload=True)
    for _ in range(3):
        step = states.open(1)
        for n, w in enumerate(wide):
            states[f"{n}.s"].extend(torch.ones(ROWS, 1, w * 8), step)
            assert sum(wide[m] for m in there(states)) <= 2 * max(wide)  # what leaves included
        states.close(step)
    assert states["0.s"].spec == states["1.s"].spec
    assert {1, 2, 3, 4, 5, 6} <= set(there(states))  # the large one is on its way, as it fits, and some behind it


@pytest.mark.parametrize("soon", [0, 1 << 10])
def test_a_large_layer_of_which_little_was_written_makes_room_for_the_next(
    monkeypatch: pytest.MonkeyPatch, soon: int
) -> None:
    monkeypatch.setattr(offload, "AHEAD", True)
    monkeypatch.setattr(offload, "SOON", soon)
    Streams(monkeypatch)
    small, keys = StateSpec("s", "recurrent", (600,), 1), StateSpec("s", "attention", (2, 3), None, axis=1)
    spec = ModelSpec(tuple(LayerSpec(n, "test", (keys if n % 4 == 3 else small,)) for n in range(12)))
    states = States(spec, rows=ROWS, dtype=torch.float32, device="cpu", offload=True)
    for tokens in (1000, 1, 1):
        step = states.open(tokens)
        for n in range(12):
            states[f"{n}.s"].extend(torch.ones(ROWS, *((2, tokens, 3) if n % 4 == 3 else (tokens, 600))), step)
            if n == 4:
                comes = 7 in there(states)
        states.close(step)
    assert comes == (soon > 0)


@pytest.mark.parametrize("wide", [6, 2, 1])  # times as large as three small ones are
def test_small_layers_come_and_go_together(monkeypatch: pytest.MonkeyPatch, wide: int) -> None:
    monkeypatch.setattr(offload, "AHEAD", True)
    streams = Streams(monkeypatch)
    sizes = [1, 1, 1, 3 * wide] * 3
    spec = ModelSpec(tuple(LayerSpec(n, "test", (StateSpec("s", "recurrent", (w,), 1),)) for n, w in enumerate(sizes)))
    states = States(spec, rows=ROWS, dtype=torch.float32, device="cpu", offload=True)
    for _ in range(3):
        Stream.recorded = 0
        step = states.open(1)
        for n, w in enumerate(sizes):
            streams.touch(*states[f"{n}.s"].buffers())
            states[f"{n}.s"].extend(torch.ones(ROWS, 1, w), step)
            assert sum(sizes[m] for m in there(states)) <= 2 * max(sizes)
        states.close(step)
    copies = 2 * 2 * 3  # there and back, of a large layer and of those before it
    assert wide == 1 or Stream.recorded <= 2 * copies  # a copy's end, and what was before it


def mixed(random: Random, rows: int) -> tuple[States, list[StateSpec]]:
    """States of small and large layers, most of which are overwritten without a word."""
    wide = [random.choice([1, 1, 1, 8]) for _ in range(8)]
    specs = [
        StateSpec("s", "attention", (w,), None)
        if random.random() < 0.2
        else StateSpec("s", "recurrent", (8 * w,), 1, leased=True)
        for w in wide
    ]
    spec = ModelSpec(tuple(LayerSpec(n, "test", (each,)) for n, each in enumerate(specs)))
    return States(spec, slack=3, rows=rows, dtype=torch.float32, device="cpu", offload=True), specs


@pytest.mark.parametrize("seed", range(40))
def test_orders_sizes_and_rows_may_be_any(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random, rows = Random(seed), 8
    monkeypatch.setattr(offload, "AHEAD", True)
    monkeypatch.setattr(offload, "SOON", random.choice([0, 300]))
    streams = Streams(monkeypatch)
    states, specs = mixed(random, rows)
    order = list(range(len(specs)))
    for n in range(12):
        tokens = random.choice([1, 1, 1, 30])
        step = states.open(tokens)
        for layer in random.sample(order, random.randint(2, 8)) if n > 2 and random.random() < 0.4 else order:
            state, width = states[f"{layer}.s"], specs[layer].shape or ()
            streams.touch(*state.buffers())
            if isinstance(state, Ring):
                state.extend(torch.randn(rows, tokens, *width), step)
            else:
                state.keep(step)
                state.write(torch.randn(rows, *width), step)
        states.close(step)
        if random.random() < 0.3:
            kept = random.choice([1, 2, 8])
            states.gather([0] * kept if kept > rows else list(range(kept)))
            rows = kept
    assert streams.checked > 100


def test_a_part_that_came_back_before_its_copy_failed_is_forgotten() -> None:
    buffer = torch.zeros(2, 4)
    home = offload.Home(buffer, torch.zeros(2, 4))
    home.late.append((home.host[:, 1:2], torch.full((2, 1), 5.0)))
    buffer.fill_(2.0)
    home.back()
    home.settle()
    assert torch.equal(home.host, buffer)


def test_what_comes_follows_orders_and_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "AHEAD", True)
    wide, keys = StateSpec("s", "recurrent", (4096,), 1), StateSpec("key", "attention", (2, 3), None, axis=1)
    spec = ModelSpec(tuple(LayerSpec(n, "test", (wide if n < 3 else keys,)) for n in range(LAYERS)))
    states = States(spec, rows=ROWS, dtype=torch.float32, device="cpu", offload=True)

    def passes(tokens: int, order: str, times: int) -> list[int]:
        for _ in range(times):
            step = states.open(tokens)
            for n in order:
                name, shape = ("s", (tokens, 4096)) if n != "3" else ("key", (2, tokens, 3))
                states[f"{n}.{name}"].extend(torch.ones(ROWS, *shape), step)
            states.close(step)
        assert states["0.s"].spec.name == "s"
        return there(states)

    assert passes(1, "0123", 3) == [0, 1]
    assert passes(1, "0213", 3) == [0, 2]
    assert passes(5000, "0213", 1) and passes(1, "0213", 2) == [0, 1, 2, 3]  # beside what has grown all have room


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(errors.OptionError, match="cannot leave the device"):
        States(SPEC, capacity=8, offload=True)
    states = States(SPEC, rows=ROWS, dtype=torch.float32, device="cpu", offload=True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(errors.StepError, match="do not compile"):
        states["0.key"]
