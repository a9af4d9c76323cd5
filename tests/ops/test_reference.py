"""The reference against a second telling of docs/design.md: loops over numbers, no tensor code."""

import math
import sys

import op_cases
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moekv.ops import reference

pytestmark = pytest.mark.usefixtures("one_thread")

inf, nan = math.inf, math.nan

# --- gating_topk ----------------------------------------------------------------------------------


def naive_gating_topk(logits, bias, mask, importance, k, temperature):
    num_experts = len(logits[0])
    weights, experts = [], []
    entropy = 0.0
    prob_sum, load = [0.0] * num_experts, [0] * num_experts
    for row, real, i in zip(logits, mask, importance, strict=True):
        z = [-inf if math.isnan(x) else min(x / temperature, 3.4028234663852886e38) for x in row]
        if max(z) == -inf:
            z = [0.0] * num_experts
        powers = [math.exp(x - max(z)) for x in z]
        probs = [power / sum(powers) for power in powers]
        rating = [p + (-inf if math.isnan(b) else b) for p, b in zip(probs, bias, strict=True)]
        chosen = sorted(range(num_experts), key=lambda e: (-rating[e], e))[:k]
        reach = 0.0 if math.isnan(i) else k * i
        counts = [1.0] + [min(max(reach - j, 0.0), 1.0) for j in range(1, k)]
        total = sum(probs[e] * c for e, c in zip(chosen, counts, strict=True))
        if not real:
            weights.append([0.0] * k)
            experts.append(list(range(k)))
            continue
        parts = [probs[e] if total else 1.0 for e in chosen]
        parts = [p * c for p, c in zip(parts, counts, strict=True)]
        weights.append([p / sum(parts) for p in parts])
        experts.append(chosen)
        for e in range(num_experts):
            prob_sum[e] += probs[e]
            load[e] += e in chosen and counts[chosen.index(e)] > 0
            entropy -= probs[e] * math.log(probs[e]) if probs[e] else 0.0
    return weights, experts, prob_sum, load, entropy


logit = st.one_of(st.sampled_from([0.0, 1.0, 1.0, -3.0, nan, inf, -inf]), st.floats(-20, 20))


@given(data=st.data(), num_tokens=st.integers(1, 4), num_experts=st.integers(1, 6))
def test_gating_topk(data, num_tokens, num_experts):
    row = st.lists(logit, min_size=num_experts, max_size=num_experts)
    logits = data.draw(st.lists(row, min_size=num_tokens, max_size=num_tokens))
    bias_value = st.sampled_from([0.0, 0.5, -2.0, nan, inf, -inf])
    bias = data.draw(st.lists(bias_value, min_size=num_experts, max_size=num_experts))
    mask = data.draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens))
    part = st.one_of(st.sampled_from([0.0, 0.5, 1.0, nan]), st.floats(-1, 2))
    importance = data.draw(st.lists(part, min_size=num_tokens, max_size=num_tokens))
    importance = torch.tensor(importance).tolist()  # what fp32 holds
    k = data.draw(st.integers(1, num_experts))
    temperature = data.draw(st.sampled_from([1.0, 0.5, 3.0]))
    result = reference.gating_topk(
        torch.tensor(logits, dtype=torch.float64),
        torch.tensor(bias),
        torch.tensor(mask),
        torch.tensor(importance).double(),
        k=k,
        temperature=temperature,
    )
    expected = naive_gating_topk(logits, bias, mask, importance, k, temperature)
    for got, want in zip(result, expected, strict=True):
        torch.testing.assert_close(got, torch.tensor(want, dtype=got.dtype), rtol=1e-12, atol=1e-15)


def test_gating_topk_gradient():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    bias = torch.randn(6, generator=generator)
    mask = torch.tensor([True, True, False, True, True])
    importance = torch.tensor([0.1, 0.5, 0.9, 0.77, 1.0], dtype=torch.float64, requires_grad=True)

    def differentiable(logits, importance):
        return reference.gating_topk(logits, bias, mask, importance, k=3, temperature=0.7)[:3:2]

    importance = importance.detach() + 0.01
    assert torch.autograd.gradcheck(differentiable, (logits, importance.requires_grad_()))


# --- expert_scores --------------------------------------------------------------------------------


def naive_head_scores(keys, values, queries, start, scaling, softcap, pool, lag):
    """Scores of each kind for one KV head: keys [T][D], values [T][Dv], queries [G][W][D]."""
    num_keys, num_queries = len(keys), len(queries[0])
    real = range(start, num_keys)
    # MASS
    mass = [0.0] * num_keys
    rows = [
        (query, num_keys - num_queries + w)
        for head in queries
        for w, query in enumerate(head)
        if num_keys - num_queries + w >= start
    ]
    for query, position in rows:
        logits = [scaling * sum(map(float.__mul__, query, keys[t])) for t in range(position + 1)]
        if softcap > 0:
            logits = [softcap * math.tanh(x / softcap) for x in logits]
        total = sum(math.exp(logits[t]) for t in range(start, position + 1))
        for t in range(start, position + 1):
            mass[t] += math.exp(logits[t]) / total / len(rows)
    # ATTENTION
    share = {}
    for t in real:
        seeing = sum(position >= t for _, position in rows)
        share[t] = mass[t] * len(rows) / seeing
    attention = [-inf] * num_keys
    for t in real:
        near = [share[u] for u in range(t - pool // 2, t + pool // 2 + 1) if u in share]
        attention[t] = math.log(max(sum(near) / len(near), 1e-20))

    # DIVERSITY
    def unit(x):
        norm = max(math.sqrt(sum(v * v for v in x)), 1e-12)
        return [v / norm for v in x]

    diversity = [-inf] * num_keys
    if real:
        directions = {t: unit(keys[t]) for t in real}
        mean = unit([sum(column) / len(real) for column in zip(*directions.values(), strict=True)])
        for t in real:
            diversity[t] = -sum(map(float.__mul__, directions[t], mean))
    # LAG
    lag_scores = [-inf] * num_keys
    partitions = [list(real)[i : i + lag] for i in range(0, len(real), lag)]
    for i, partition in enumerate(partitions):
        following = list(real)[-lag:]
        if i + 1 < len(partitions) and len(partitions[i + 1]) == lag:
            following = partitions[i + 1]
        shares = []
        for x in (keys, values):
            spreads = []
            for t in partition:
                scaled = []
                for d in range(len(x[t])):
                    channel = [x[u][d] for u in following]
                    low, high = min(channel), max(channel)
                    scaled.append((x[t][d] - low) / (high - low + 1e-6))
                mean = sum(scaled) / len(scaled)
                square = sum((v - mean) ** 2 for v in scaled)
                spreads.append(math.sqrt(square / max(len(scaled) - 1, 1)))
            powers = [math.exp(s - max(spreads)) for s in spreads]
            shares.append([power / sum(powers) * len(partition) for power in powers])
        for j, t in enumerate(partition):
            lag_scores[t] = math.log(max((shares[0][j] + shares[1][j]) / 2, 1e-20))
    return mass, attention, diversity, lag_scores


@pytest.mark.parametrize("tile", [8, 1024])
@pytest.mark.parametrize(
    "shape, value_dim, num_queries, start, softcap, pool, lag",
    [
        ((1, 1, 1, 3), 2, 1, (0,), 0.0, 1, 4),
        ((2, 2, 30, 4), 3, 5, (0, 11), 0.0, 5, 4),
        ((3, 1, 25, 3), 1, 25, (24, 25, 3), 3.0, 3, 7),
        ((2, 1, 21, 1), 4, 4, (0, 19), 0.0, 1, 100),
        ((1, 2, 24, 5), 5, 3, (0,), 1.0, 7, 6),
        ((1, 1, 19, 2), 2, 2, (5,), 0.0, 33, 1),
    ],
)
def test_expert_scores(shape, value_dim, num_queries, start, softcap, pool, lag, tile, monkeypatch):
    monkeypatch.setattr(sys.modules["moekv.ops.reference.expert_scores"], "TILE", tile)
    batch, num_kv_heads, num_keys, head_dim = shape
    generator = torch.Generator().manual_seed(num_keys)
    keys = torch.randn(shape, dtype=torch.float64, generator=generator)
    values = torch.randn(*shape[:3], value_dim, dtype=torch.float64, generator=generator)
    queries = torch.randn(
        batch, 2 * num_kv_heads, num_queries, head_dim, dtype=torch.float64, generator=generator
    )
    options = {"scaling": 0.4, "softcap": softcap, "pool": pool, "lag": lag}
    kinds = [3, 0, 2, 1]
    scores = reference.expert_scores(
        keys, values, queries, torch.tensor(start, dtype=torch.int32), kinds=kinds, **options
    )
    for b in range(batch):
        for h in range(num_kv_heads):
            expected = naive_head_scores(
                keys[b, h].tolist(),
                values[b, h].tolist(),
                queries[b, 2 * h : 2 * h + 2].tolist(),
                start[b],
                **options,
            )
            for kind, got in zip(kinds, scores[:, b, h], strict=True):
                want = torch.tensor(expected[kind], dtype=torch.float64)
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


# --- project_tokens -------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [[True] * 5, [False, True, True, False, True], [False] * 5])
def test_project_tokens(mask):
    hidden = torch.randn(5, 3, generator=torch.Generator().manual_seed(2)).double()
    real = [i for i in range(5) if mask[i]]
    rows = [[x / math.hypot(*row) for x in row] for row in hidden.tolist()]
    total = [sum(rows[i][c] for i in real) for c in range(3)]
    length = math.hypot(*total)
    distance = {i: 1 - sum(map(math.prod, zip(rows[i], total, strict=True))) / length for i in real}
    mean = sum(distance.values()) / max(len(real), 1)
    spread = math.sqrt(sum((d - mean) ** 2 for d in distance.values()) / max(len(real), 1))
    expected = [(distance[i] - mean) / (spread + 1e-4) if mask[i] else 0.0 for i in range(5)]
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 1.0]], dtype=torch.float64)
    projected, standout = reference.project_tokens(hidden[None], weight, torch.tensor([mask]))
    torch.testing.assert_close(standout, torch.tensor([expected], dtype=torch.float64))
    for got, (x, y, z), is_real in zip(projected[0].tolist(), hidden.tolist(), mask, strict=True):
        assert got == pytest.approx([x - 2 * y + 0.5 * z, z] if is_real else [0.0, 0.0])


# --- mix_scores -----------------------------------------------------------------------------------


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
def test_mix_scores(per_head, mapped):
    case = op_cases.MixScores((3, 2, 2, 9), 2, per_head, gain=mapped, offset=mapped)
    (scores, weights, experts, gain, offset), _ = case.inputs()
    mixed = reference.mix_scores(scores.double(), weights, experts, gain, offset)
    for b, h, t in torch.cartesian_prod(*map(torch.arange, mixed.shape)).tolist():
        at = (b, h, t) if per_head else (b, t)
        expected = 0.0
        for w, e in zip(weights[at].tolist(), experts[at].tolist(), strict=True):
            score = scores[e, b, h, t].item()
            if mapped:
                score = gain[e, b, h].item() * score + offset[e, b, h].item()
            expected += w * score if w else 0.0
        assert mixed[b, h, t].item() == pytest.approx(expected, rel=1e-12)


# --- select_kept ----------------------------------------------------------------------------------


def naive_select_kept(group, start, total, sinks, window, floor):
    """The kept positions of each row of one group; group [R][T], start [R]."""
    num_rows, num_keys = len(group), len(group[0])
    share = total // num_rows
    sinks = min(sinks, share)
    window = min(window, share - sinks)
    floor = min(floor, share)

    def rank(row, t):  # smaller is better
        score = group[row][t]
        padding = t < start[row]
        not_number = math.isnan(score)
        value = 0.0 if padding or not_number else -score
        return padding, not_number and not padding, value, row, t

    kept = []
    for row in range(num_rows):
        real = list(range(start[row], num_keys))
        mine = set(real[:sinks]) | set(real[len(real) - window :] if window else [])
        others = sorted(set(range(num_keys)) - mine, key=lambda t: rank(row, t))
        mine.update(others[: max(0, floor - len(mine))])
        kept.append(mine)
    rest = [(row, t) for row in range(num_rows) for t in range(num_keys) if t not in kept[row]]
    rest.sort(key=lambda item: rank(*item))
    for row, t in rest[: total - sum(map(len, kept))]:
        kept[row].add(t)
    return [sorted(mine) for mine in kept]


@st.composite
def select_kept_inputs(draw):
    groups, rows, num_keys = (draw(st.integers(1, n)) for n in (2, 3, 9))
    score = st.sampled_from([0.0, -0.0, 1.0, 1.5, -1.0, nan, inf, -inf])
    scores = draw(
        st.lists(score, min_size=groups * rows * num_keys, max_size=groups * rows * num_keys)
    )
    start = draw(st.lists(st.integers(0, num_keys), min_size=groups * rows, max_size=groups * rows))
    return (
        torch.tensor(scores).view(groups, rows, num_keys),
        torch.tensor(start, dtype=torch.int32).view(groups, rows),
        {
            "total": [draw(st.integers(rows, rows * num_keys)) for _ in range(groups)],
            "sinks": draw(st.integers(0, 4)),
            "window": draw(st.integers(0, 4)),
            "floor": draw(st.integers(0, 4)),
        },
    )


@given(select_kept_inputs())
def test_select_kept(inputs):
    scores, start, options = inputs
    indices, offsets = reference.select_kept(scores, start, **options)
    kept = [
        row
        for g, total in enumerate(options["total"])
        for row in naive_select_kept(
            scores[g].tolist(), start[g].tolist(), **(options | {"total": total})
        )
    ]
    assert indices.tolist() == [t for row in kept for t in row]
    assert offsets.diff(prepend=torch.tensor([0])).tolist() == [0, *map(len, kept)]


# --- kv_compact_ ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", op_cases.KV_COMPACT, ids=str)
def test_kv_compact_(case):
    op_cases.check_kv_compact_(reference.kv_compact_, case)


# --- All ------------------------------------------------------------------------------------------


ONE_OF_EACH = [
    ("gating_topk", op_cases.GatingTopk(9, 8, 2, bias=True, mask=True)),
    ("expert_scores", op_cases.ExpertScores((2, 2, 40, 8), start=(0, 3), pool=3)),
    ("expected_attention", op_cases.ExpectedAttention((2, 2, 90, 8), start=(0, 3))),
    ("project_tokens", op_cases.ProjectTokens((2, 9, 8), mask=True)),
    ("mix_scores", op_cases.MixScores((4, 2, 2, 9), 2)),
    ("select_kept", op_cases.SelectKept((2, 2, 9), (7, 9), 1, 1, padding=True)),
    ("kv_compact_", op_cases.KvCompact((1, 3, 9, 4), (2, 0, 9))),
    ("kv_compact_", op_cases.KvCompact((1, 3, 9, 4), (2, 0, 9), packed=True)),
]


@pytest.mark.parametrize("name, case", ONE_OF_EACH, ids=str)
def test_needs_no_values(name, case):
    """Meta tensors have none: whatever would wait for one of the device's raises."""
    inputs, options = case.inputs()
    inputs = [None if x is None else x.to("meta") for x in inputs]
    getattr(reference, name)(*inputs, **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name, case", ONE_OF_EACH, ids=str)
def test_does_not_wait_for_cuda(name, case):
    inputs, options = case.inputs("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        getattr(reference, name)(*inputs, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
