"""The ring of a layer's last inputs against a plain list."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from moekv.cache.recent import RecentStates

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 9)),
        st.tuples(st.just("crop"), st.integers(1, 12)),
        st.tuples(st.just("unseen"), st.integers(1, 3)),
        st.tuples(st.just("keep"), st.integers(0, 6)),
        st.tuples(st.just("select"), st.integers(0, 5)),
    ),
    max_size=12,
)


def asked_by(states: torch.Tensor) -> torch.Tensor:
    """Queries [B, 2, N, 1] that tell of whom they are."""
    return torch.stack([states, -states], 1)[..., :1]


def append(ring: RecentStates, states: torch.Tensor, end: int) -> None:
    """Append states, and of their queries no more than are to be remembered."""
    ring.append(states, asked_by(states)[:, :, -ring.size :], end)


@given(size=st.integers(1, 6), steps=STEPS)
def test_the_ring_is_a_list(size: int, steps: list[tuple[str, int]]) -> None:
    ring, known, length, batch, serial = RecentStates(size), [], 0, 2, 0
    for name, number in [*steps, ("append", 1)]:
        if name == "append":
            states = torch.arange(serial, serial + number * batch).view(number, batch)
            serial += number * batch
            length += number
            known = [*known, *states][-size:]
            append(ring, states.T[..., None].float(), length)
        elif name == "crop":  # seen at the next append
            number = min(number, length)
            length -= number
            known = known[: max(len(known) - number, 0)]
            # What the ring cannot know before it sees the length.
            append(ring, torch.zeros(batch, 0, 1), length)
        elif name == "unseen":
            length += number
            append(ring, torch.zeros(batch, 0, 1), length)
            known = []
        elif name == "keep" and not ring._rings:
            continue
        elif name == "keep":
            known = known[len(known) - min(len(known), number) :]
            ring.keep([number] * batch)
        else:
            rows = torch.tensor([number % 2, 1])
            known = [states[rows] for states in known]
            ring.select(rows)
    assert ring.counts() == [len(known)] * batch
    for newest in range(len(known) + 1):
        expected = known[len(known) - newest :]
        got = ring.states(newest)[..., 0]
        assert got.T.tolist() == [states.tolist() for states in expected]
        assert torch.equal(ring.queries(newest), asked_by(ring.states(newest)))


def test_rows_of_another_batch_are_not_mixed_with_those_before() -> None:
    ring = RecentStates(3)
    append(ring, torch.zeros(1, 2, 4), 2)
    append(ring, torch.ones(2, 1, 4), 3)
    assert torch.equal(ring.states(3), torch.ones(2, 1, 4))


def test_states_are_detached() -> None:
    ring = RecentStates(3)
    append(ring, torch.ones(1, 2, 4, requires_grad=True) * 2, 2)
    assert not ring.states(2).requires_grad and not ring.queries(2).requires_grad
