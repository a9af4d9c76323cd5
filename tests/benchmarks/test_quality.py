"""The quality benchmark's instrument: does it measure what it says?"""

import copy
import dataclasses
import json
import math
import random
import re
import struct
import zlib
from pathlib import Path

import kvpress
import pytest
import torch
from quality_model import make_model
from tiny_models import tiny_model, tokens
from tokenizers import processors
from transformers import DynamicCache

from benchmarks.quality import history, presses, report, tasks, texts
from benchmarks.quality import run as runner
from benchmarks.quality import targets as aims
from benchmarks.quality.metrics import (
    LEAST_KL,
    compare,
    geometric,
    mean,
    over_tasks,
    share_interval,
)
from benchmarks.quality.replay import (
    answer_logits,
    attending,
    decoder_layers,
    footprint,
    prefill,
    record,
    replay,
)
from moekv import MoERouterPress, PiKVMoERouter
from moekv.cache.ragged import RaggedLayer
from moekv.experts.registry import build_experts
from moekv.models.hooks import find_layers, is_sliding

NEED_DOWNLOADS = {
    "DuoAttentionPress",
    "ExpectedAttentionStatsPress",
    "FastKVzipPress",
    "KVzapPress",
    "LUKVPress",
    "QFilterPress",
}
UNTRIED = NEED_DOWNLOADS | presses.EAGER | presses.LIVE
UNTRIED |= set(list(presses.LENT)[1:-1])  # one of each format
UNTRIED |= set(list(presses.LENT_FOLDED)[1:-1])
UNTRIED |= presses.CALIBRATED_LISTS.keys()  # for another model
UNTRIED |= {*list(presses.MERITS)[1:-1], *list(presses.IN_LISTS)[3:]}  # a few of many alike
LOCAL = [name for name in presses.METHODS if name not in UNTRIED]


def random_ids(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, length), generator=generator)


def contents(model, cache):
    """Everything of a compressed cache that attention can see."""
    found = []
    for layer, cached in zip(decoder_layers(model), cache.layers, strict=True):
        if isinstance(cached, RaggedLayer):
            found += [cached.stored_keys, cached.stored_values, cached.begin, cached.end]
            continue
        found += [cached.keys, cached.values]
        masked = getattr(layer.self_attn, "masked_key_indices", None)
        found += [] if masked is None else list(masked)
    return found


# Replay


@pytest.mark.parametrize("ratio", [0.5, 0.9])
@pytest.mark.parametrize("name", LOCAL)
def test_replay_gives_what_a_prefill_gives(model, tokenizer, name, ratio):
    input_ids = random_ids(150)
    build = presses.METHODS[name]
    with runner._findable_tokenizer(model, tokenizer):
        torch.manual_seed(1)  # Compactor and the leverage scores draw sketches
        live = contents(model, prefill(model, input_ids, build(ratio)))
        torch.manual_seed(1)
        replayed = contents(model, replay(model, record(model, input_ids), build(ratio)))
    assert len(live) == len(replayed) >= 6
    assert all(torch.equal(a, b) for a, b in zip(live, replayed, strict=True))
    whole = contents(model, prefill(model, input_ids, None))
    assert len(live) != len(whole) or any(
        a.shape != b.shape for a, b in zip(live, whole, strict=True)
    )


def test_replay_runs_no_attention_and_no_mlp(model, monkeypatch):
    recording = record(model, random_ids(20))

    def fail(*args, **kwargs):
        raise AssertionError("computed instead of recalled")

    for layer in decoder_layers(model):
        monkeypatch.setattr(layer.self_attn.q_proj, "forward", fail)
        monkeypatch.setattr(layer.mlp.down_proj, "forward", fail)
    replay(model, recording, None)
    with pytest.raises(AssertionError, match="computed instead of recalled"):
        prefill(model, random_ids(20), None)


def test_replay_does_not_inherit_the_masks_of_the_press_before(model):
    recording = record(model, random_ids(100))
    replay(model, recording, presses.METHODS["AdaKV(KeyDiff)"](0.5))
    cache = replay(model, recording, None)
    assert footprint(model, cache, recording).kept == 3 * 2 * 100


def test_model_and_recording_survive_a_press_that_raises(model):
    class Broken(kvpress.KnormPress):
        def score(self, *args, **kwargs):
            raise ArithmeticError

    recording = record(model, random_ids(60))
    before = [tape.keys.clone() for tape in recording.layers]
    with pytest.raises(ArithmeticError):
        replay(model, recording, Broken(0.5))
    assert all("forward" not in vars(layer.self_attn) for layer in decoder_layers(model))
    assert all("forward" not in vars(layer.mlp) for layer in decoder_layers(model))
    assert all(torch.equal(a, t.keys) for a, t in zip(before, recording.layers, strict=True))


def test_answer_logits_are_those_of_one_long_text():
    model = make_model(initializer_range=0.3)  # fp32 and strong attention: positions matter
    context, question, answer = random_ids(80), random_ids(7, 1), random_ids(5, 2)
    whole = torch.cat([context, question, answer], dim=1)
    expected = model(whole).logits[0, 86:91]
    logits = answer_logits(model, prefill(model, context, None), 80, question, answer)
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)

    class OfOneLayer(kvpress.KnormPress):
        """Leaves layers of different lengths."""

        def compress(self, module, hidden_states, keys, values, attentions, kwargs):
            kept = slice(None) if module.layer_idx else slice(1, None)
            return keys[:, :, kept], values[:, :, kept]

    # One token at a time, and still at the true positions: close to what one forward pass gives.
    mask = torch.ones(1, 1, 92, 92).tril().log()
    mask[..., 80:, 0] = -torch.inf
    cache = prefill(model, context, OfOneLayer(0.1))
    uneven = answer_logits(model, cache, 80, question, answer)
    first = model.model.layers[0].self_attn
    hide = first.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"attention_mask": mask}), with_kwargs=True
    )
    expected = model(torch.cat([context, question, answer], dim=1)).logits[0, 86:91]
    hide.remove()
    torch.testing.assert_close(uneven, expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(uneven, logits, atol=1e-3)


def test_exact_is_what_greedy_decoding_gives(model):
    context, question = random_ids(50), random_ids(6, 1)
    prompt = torch.cat([context, question], dim=1)
    greedy = model.generate(prompt, max_new_tokens=4, do_sample=False)[:, 56:]
    logits = answer_logits(model, prefill(model, context, None), 50, question, greedy)
    assert compare(logits, logits, greedy[0]).exact
    wrong = greedy.clone()
    wrong[0, 2] = (wrong[0, 2] + 1) % 256
    logits = answer_logits(model, prefill(model, context, None), 50, question, wrong)
    assert not compare(logits, logits, wrong[0]).exact


@pytest.mark.parametrize("name", ["SnapKVPress", "AdaKV(SnapKV)", "KVzipPress", "moekv"])
def test_footprint_counts_what_is_kept(model, tokenizer, name):
    recording = record(model, random_ids(200))
    with runner._findable_tokenizer(model, tokenizer):
        cache = replay(model, recording, presses.METHODS[name](0.75))
    size = footprint(model, cache, recording)
    assert (size.kept, size.pairs) == (3 * 2 * 50, 3 * 2 * 200)
    pair = 2 * 16 * 2  # bytes of a key and a value in bf16
    if name == "KVzipPress":  # masks, and holds on to the storage of its second reading
        assert size.bytes > pair * size.pairs
    elif name == "moekv":  # may leave room for new tokens
        assert pair * size.kept <= size.bytes < pair * size.pairs
    else:
        assert size.bytes == pair * (size.pairs if name.startswith("AdaKV") else size.kept)


# Metrics


def test_compare_matches_hand_computed_values():
    full = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    other = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    quality = compare(other, full, torch.tensor([1, 0]))
    assert quality.kl == pytest.approx(0.5 * (0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)))
    assert quality.tv == pytest.approx(0.5 * 0.25)
    assert quality.nll == pytest.approx(-0.5 * (math.log(0.75) + math.log(0.9)))
    assert quality.exact and not compare(other, full, torch.tensor([0, 0])).exact
    same = compare(full, full, torch.tensor([0, 0]))
    assert same.kl == same.tv == 0


@pytest.mark.parametrize(
    "num_tasks, samples, failures",
    [
        (1, 4, 0.0),  # of one task, no interval knows of failures that it has not seen
        *((*size, share) for size in ((6, 2), (10, 2), (10, 4), (10, 8)) for share in (0.0, 0.2)),
    ],
)
def test_intervals_cover_as_often_as_they_say(num_tasks, samples, failures):
    """Of logs whose spread differs from task to task, and where a fifth of the samples fails."""
    rng = random.Random(0)
    trials, hits = 1500, 0
    for _ in range(trials):
        tasks_, truth = [], 0.0
        for _ in range(num_tasks):
            middle, spread = rng.gauss(-3, 1), rng.uniform(0.3, 1.2)
            truth += (middle + 3 * failures) / num_tasks
            drawn = (rng.gauss(middle, spread) for _ in range(samples))
            tasks_.append(mean([x + 3 * (rng.random() < failures) for x in drawn]))
        low, high = over_tasks(tasks_).interval()
        hits += low <= truth <= high
    assert 0.93 <= hits / trials <= 0.99


def test_the_best_of_many_peers_is_flattered_and_no_interval_knows():
    """What docs/results-detail.md says of ratios to the best of twenty."""
    rng = random.Random(0)
    found, trials = [], 200
    for _ in range(trials):
        ratios = []
        for _ in range(10):
            hard = [rng.gauss(0, 0.6) for _ in range(4)]
            levels = [abs(rng.gauss(0, 1.0)) for _ in range(20)]
            peers = [
                [x + level - min(levels) + rng.gauss(0, 0.5) for x in hard] for level in levels
            ]
            best = min(peers, key=sum)
            own = [x - 2 + rng.gauss(0, 0.5) for x in hard]
            ratios.append(mean([a - b for a, b in zip(own, best, strict=True)]))
        found.append(over_tasks(ratios).value)
    assert 1.15 < math.exp(sum(found) / trials + 2) < 1.35  # the best peer's true ratio is exp(-2)


def test_one_sample_has_no_interval_and_equal_ones_have_no_width():
    one = mean([0.5])
    assert one.value == 0.5 and one.interval() is None
    assert over_tasks([mean([1.0, 2.0]), one]).interval() is None
    same = over_tasks([mean([1.0, 1.0]), mean([3.0, 3.0])])
    assert same.value == 2 and same.interval() == (2.0, 2.0)
    low, high = mean([1.0, 3.0]).interval()
    assert (low, high) == pytest.approx((2 - 12.7062, 2 + 12.7062))  # Student's t, 1 degree
    assert share_interval(1, 1) is None
    assert share_interval(4, 4) == pytest.approx((0.5101, 1.0), abs=1e-4)  # Wilson
    assert geometric([1e-9, 1e-4]) == pytest.approx(LEAST_KL)
    assert geometric([0.1, 0.4]) == pytest.approx(0.2)


# Tasks and texts


@pytest.mark.usefixtures("local_texts")
@pytest.mark.parametrize("task", tasks.TASKS)
def test_tasks_are_seeded_and_of_the_wanted_length(tokenizer, task):
    def make(index, seed=0):
        return tasks.make_sample(task, tokenizer, length=2000, index=index, seed=seed)

    sample = make(0)
    assert sample == make(0)
    assert len({sample, make(1), make(0, seed=1)}) == 3
    context, question, answer = tasks.encode(sample, tokenizer)
    assert 1700 <= len(context) <= 2300
    assert question and answer
    assert tokenizer.decode(context).startswith("U:") == sample.chat
    prompt, behind, told = tasks.encode(sample, tokenizer, seen=True)
    assert prompt + behind == context + question and told == answer and behind
    begins = tokenizer(sample.answer_prefix, add_special_tokens=False).input_ids
    assert behind == (begins or question[-1:])


@pytest.mark.usefixtures("local_texts")
@pytest.mark.parametrize("task", ["facts", "labelling"])
def test_models_that_know_no_chats_get_plain_text(tokenizer, task):
    sample = tasks.make_sample(task, tokenizer, length=500, index=0)
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    context, question, answer = tasks.encode(sample, plain)
    between = "\n" if sample.chat else ""
    asked = f"\n\n{sample.question}{between}" if sample.chat else sample.question
    assert context == plain(sample.context).input_ids
    assert question == plain(asked).input_ids + plain(sample.answer_prefix).input_ids
    assert tasks.encode(sample, tokenizer)[2] == answer

    # What a tokenizer puts before every text comes once, before the context.
    plain._tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A", special_tokens=[("<unk>", 256)]
    )
    assert tasks.encode(sample, plain) == ([256, *context], question, answer)


@pytest.mark.usefixtures("local_texts")
@pytest.mark.parametrize("task", ["needle_noise", "needle_prose", "needles_prose", "many_keys"])
def test_needles_have_one_true_answer(tokenizer, task):
    sample = tasks.make_sample(task, tokenizer, length=2000, index=3)
    assert sample.context.count(f"{sample.answer_prefix}{sample.answer}.") == 1
    assert sample.context.count(sample.answer_prefix) == 1
    assert sample.context.count("secret number") == {"needles_prose": 4}.get(
        task, 1 if task.startswith("needle_") else sample.context.count("\n") + 1
    )


@pytest.mark.usefixtures("local_texts")
def test_answers_follow_from_the_contexts(tokenizer):
    for index in range(5):
        facts = tasks.make_sample("facts", tokenizer, length=3000, index=index)
        assert f"{facts.answer_prefix}{facts.answer}." in facts.context
        passage = tasks.make_sample("recall", tokenizer, length=3000, index=index)
        assert passage.answer_prefix + passage.answer in passage.context
        label = tasks.make_sample("labelling", tokenizer, length=3000, index=index)
        noun = next(n for n in sum(tasks.TOPICS.values(), ()) if n in label.question)
        shown = [e for e in label.context.split("\n\n") if noun in e]
        assert shown and all(e.strip().endswith(f"Label:{label.answer}") for e in shown)
        chain = tasks.make_sample("variable_tracking", tokenizer, length=3000, index=index)
        names = chain.answer.strip().split(", ")
        value = chain.question.split("value ")[1].split()[0]
        at = [
            chain.context.index(f"VAR {a} = {b}.")
            for a, b in zip(names, [value, *names], strict=False)
        ]
        assert at == sorted(at) and len(at) == 4


def test_no_document_is_in_both_splits():
    where = {}
    for document in texts.DOCUMENTS:
        assert document.split in ("test", "calibration")
        where.setdefault((document.package, document.member), set()).add(document.split)
    assert all(len(splits) == 1 for splits in where.values())
    assert {d.kind for d in texts.documents("test", "prose")} == {"prose"}
    assert texts.documents("test", "code") and texts.documents("calibration", "code")


def test_a_text_that_changed_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("MOEKV_CACHE", str(tmp_path))
    monkeypatch.setattr(texts, "_fetch", lambda package, member: "another text")
    with pytest.raises(OSError, match="expected .*, got "):
        texts.DOCUMENTS[0].text()
    assert not list(tmp_path.rglob("*.txt"))
    good = dataclasses.replace(texts.DOCUMENTS[0], sha256=texts._sha256(b"another text"))
    assert good.text() == "another text"
    monkeypatch.setattr(texts, "_fetch", lambda package, member: pytest.fail("fetched again"))
    assert good.text() == "another text"


def test_r_data_is_read(tmp_path):
    def stream(strings):
        body = b"X\nheader" + struct.pack(">ii", 16, len(strings))
        for s in strings:
            body += struct.pack(">ii", 0x00040009, len(s.encode())) + s.encode()
        packed = zlib.compress(body)
        return struct.pack(">i", len(body)) + packed

    database = tmp_path / "Rdata.rdb"
    database.write_bytes(stream(["not", "this"]) + stream(["It was", "", "a truth—"]))
    assert texts._read_r_data(database, 1) == "It was\n\na truth—"


def test_prose_is_unwrapped():
    assert texts._prose("One\r\n line.\r\n\r\n\r\nTwo.\n\n") == "One line.\nTwo."


# Runs and reports


@pytest.mark.usefixtures("local_texts")
def test_a_run_goes_on_where_it_stopped(model, tokenizer, few_methods, tmp_path):
    path = tmp_path / "answers.jsonl"
    wanted = list(runner.cells(["facts"], [1500], 2, few_methods, [0.5, 0.75]))
    assert len(wanted) == 2 * (1 + 3 * 2)
    runner.run(model, tokenizer, wanted[:4], path)
    first = path.read_text()
    with path.open("a") as file:
        file.write('{"cell": {"task": "fac')  # killed while writing
    runner.run(model, tokenizer, wanted, path)
    assert path.read_text().startswith(first)
    rows = runner.read_results(path)
    assert [runner.Cell(**row["cell"]) for row in rows] == wanted

    straight = tmp_path / "straight.jsonl"
    runner.run(model, tokenizer, wanted, straight, live=True)
    for row, other in zip(rows, runner.read_results(straight), strict=True):
        row.pop("seconds", None), other.pop("seconds", None)
        assert row == other
    asked = tmp_path / "seen.jsonl"
    runner.run(model, tokenizer, wanted[:3], asked, seen=True)
    for row, other in zip(rows, runner.read_results(asked), strict=False):
        assert row["cell"] == other["cell"] and row["pairs"] < other["pairs"]
    runner.forget(straight, ["KnormPress"])
    rest = [row["cell"]["method"] for row in runner.read_results(straight)]
    assert len(rest) == len(wanted) - 4 and "KnormPress" not in rest

    failed = [row for row in rows if "error" in row]
    assert {row["cell"]["method"] for row in failed} == {"Failing"} and len(failed) == 4
    assert "ValueError" in failed[0]["error"] and "no such luck" in failed[0]["error"]
    full = [row for row in rows if row["cell"]["method"] == runner.FULL]
    assert all(row["kl"] == 0 and row["kept"] == row["pairs"] for row in full)
    halves = [row for row in rows if row["cell"]["ratio"] == 0.5 and "error" not in row]
    assert all(row["kl"] > 0 and 0.49 < row["kept"] / row["pairs"] <= 0.5 for row in halves)


@pytest.mark.usefixtures("local_texts")
@pytest.mark.parametrize("name", sorted(presses.EAGER))
def test_methods_that_read_attention_weights_prefill_under_eager_attention(
    model, tokenizer, tmp_path, name
):
    path = tmp_path / "answers.jsonl"
    wanted = [runner.Cell("facts", 400, 0, m, 0.5) for m in ("AdaKV(KeyDiff)", name)]
    cell = wanted[1]
    runner.run(model, tokenizer, wanted, path)
    assert model.config._attn_implementation == "sdpa"

    sample = tasks.make_sample(cell.task, tokenizer, length=cell.length, index=cell.index)
    context, question, answer = (torch.tensor([part]) for part in tasks.encode(sample, tokenizer))
    with attending(model, "eager"):
        full = prefill(model, context, None)
        compressed = prefill(model, context, presses.METHODS[name](cell.ratio))
    size = footprint(model, compressed, record(model, context))
    logits = [
        answer_logits(model, cache, context.shape[1], question, answer)
        for cache in (compressed, full)
    ]
    _, measured = runner.read_results(path)
    expected = compare(*logits, answer[0])
    assert measured["kl"] == expected.kl > 0 and measured["nll"] == expected.nll
    assert (measured["kept"], measured["bytes"]) == (size.kept, size.bytes)
    assert size.kept < 0.6 * size.pairs


@pytest.mark.usefixtures("local_texts")
def test_a_press_that_fails_leaves_the_next_ones_their_attention(
    model, tokenizer, few_methods, tmp_path
):
    class Switching(few_methods["Failing"]):
        def post_init_from_model(self, model):
            model.config._attn_implementation = "eager"

    wanted = list(runner.cells(["facts"], [400], 1, ["KnormPress"], [0.5]))
    runner.run(model, tokenizer, wanted, tmp_path / "alone.jsonl")
    few_methods["Switching"] = Switching
    wanted.insert(1, runner.Cell("facts", 400, 0, "Switching", 0.5))
    runner.run(model, tokenizer, wanted, tmp_path / "after.jsonl")
    assert model.config._attn_implementation == "sdpa"
    alone, after = (
        runner.read_results(tmp_path / f"{name}.jsonl")[-1] for name in ("alone", "after")
    )
    assert alone["kl"] == after["kl"] > 0


@pytest.mark.usefixtures("local_texts")
def test_errors_name_the_model_and_no_folder(model, tokenizer, few_methods, tmp_path, monkeypatch):
    class Looking(few_methods["Failing"]):
        def post_init_from_model(self, model):
            raise KeyError(f"nothing for {model.config.name_or_path}!")

    few_methods["Looking"] = Looking
    monkeypatch.setattr(model.config, "name_or_path", "tiny/model")
    cells = [runner.Cell("facts", 400, 0, "Looking", 0.5)]
    runner.run(model, tokenizer, cells, tmp_path / "answers.jsonl")
    (row,) = runner.read_results(tmp_path / "answers.jsonl")
    assert row["error"] == "KeyError: 'nothing for tiny/model!'"


@pytest.mark.usefixtures("local_texts")
def test_history_is_measured_on_one_press_for_all_contexts(model, tokenizer, tmp_path):
    def make(aware):  # as likely by themselves; `selective` has more hits, which only one learns
        experts = build_experts(["semantic", "selective"])
        router = PiKVMoERouter(
            model.config.hidden_size,
            2,
            1,
            cache_aware=aware,
            cache_update_interval=2,
        )
        return MoERouterPress(0.5, experts=experts, router_type=router, cache_aware=aware)

    made = [make(False), make(True)]
    names = ["facts", "recall", "many_keys"]
    rows = history.serve(model, tokenizer, made, names, samples=2, length=400)
    assert [press.get_stats()["forward_count"] for press in made] == [6, 6]
    off, on = ([r for r in rows if r["cache_aware"] is aware] for aware in (False, True))
    assert [(r["task"], r["index"]) for r in off] == [(n, i) for i in range(2) for n in names]
    kls = [(a["kl"], b["kl"]) for a, b in zip(off, on, strict=True)]
    assert all(min(pair) > 0 for pair in kls) and any(a != b for a, b in kls)
    # What a press of its own gives, where there is no history but its own hit rates.
    alone = history.serve(model, tokenizer, [make(True)], names[:1], samples=1, length=400)
    assert alone[0]["kl"] == kls[0][1]

    lines = history.table({"rows": rows, "cache_update_interval": 2})
    (recall,) = (line for line in lines if line.startswith("| recall"))
    assert recall == f"| recall | {kls[4][0]:.3f}, {kls[4][1]:.3f} |"
    mean = math.exp(sum(math.log(b / a) for a, b in kls[2:]) / 4)
    assert lines[-1].startswith(f"| with / without | **{mean:.3f}**, ")


def row(task, index, method, ratio, kl, exact=False, kept=1, size=10):
    cell = runner.Cell(task, 500, index, method, ratio)
    measured = {"kl": kl, "nll": 2 * kl, "exact": exact, "kept": kept, "pairs": 2, "bytes": size}
    return {"cell": dataclasses.asdict(cell), "seconds": 0.0} | measured


def test_report_averages_ranks_and_tells_of_failures(few_methods, tmp_path):
    rows = [
        *(row("a", i, runner.FULL, 0.0, 0.0, True, 2, 20) for i in range(2)),
        *(row("b", i, runner.FULL, 0.0, 0.0, True, 2, 20) for i in range(2)),
        *(row("a", i, "KnormPress", 0.5, kl, kl < 0.2) for i, kl in enumerate((0.1, 0.4))),
        *(row("b", i, "KnormPress", 0.5, 0.4) for i in range(2)),
        *(row("a", i, "KeyDiffPress", 0.5, 0.8) for i in range(2)),
        *(row("b", i, "KeyDiffPress", 0.5, 0.1) for i in range(2)),
        {"cell": dataclasses.asdict(runner.Cell("a", 500, 0, "Failing", 0.5)), "error": "Broken"},
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    meta = {"model": "tiny", "dtype": "bfloat16", "seed": 0, "machine": "here", "commit": "abc"}
    path.with_suffix(".meta.json").write_text(json.dumps(meta | {"versions": {"torch": "2"}}))
    written = report.write_report(path, tmp_path / "out")
    assert all(file.stat().st_size > 0 for file in written)
    assert {file.suffix for file in written} == {".json", ".md", ".png"}

    summary = json.loads(written[0].read_text())
    (cell,) = (c for c in summary["cells"] if (c["task"], c["method"]) == ("a", "KnormPress"))
    assert cell["kl"] == pytest.approx(0.2) and cell["exact"] == 0.5 and cell["samples"] == 2
    apart = math.log(2) * 12.7062  # Student's t of two samples; half of log(4) is their error
    assert cell["kl_interval"] == pytest.approx([0.2 * math.exp(x) for x in (-apart, apart)], 1e-3)
    assert cell["kept"] == cell["bytes"] == 0.5
    assert summary["errors"] == {"Failing": {"error": "Broken", "answers": 1}}
    knorm, keydiff = summary["overall"]
    assert (knorm["method"], keydiff["method"]) == ("KnormPress", "KeyDiffPress")
    assert knorm["regret"] == pytest.approx(0.5 * math.log(4))
    assert keydiff["regret"] == pytest.approx(0.5 * math.log(4))
    assert knorm["kl"] == pytest.approx(math.sqrt(0.2 * 0.4)) and knorm["samples"] == 2
    # Task b has no spread: the error is half of that of task a.
    assert math.log(knorm["kl_interval"][1] / knorm["kl"]) == pytest.approx(apart / 2, 1e-3)
    # It is the best peer of task a.
    assert knorm["regret_interval"] == pytest.approx([math.log(2), math.log(2)])

    page = tmp_path / "docs.md"
    report.write_report(path, tmp_path / "out", page)
    assert "![regret-500-50](quality-regret-500-50.png)" in page.read_text()
    assert (tmp_path / "quality-regret-500-50.png").stat().st_size > 0
    assert report.NOTES.read_text().splitlines()[0] in page.read_text()
    assert "{targets}" in report.NOTES.read_text() and "{targets}" not in page.read_text()
    assert "## Calibration" not in page.read_text()  # the package has no router for this model

    page = written[1].read_text()
    assert "| KnormPress | **0.200** | 0.400 |" in page
    assert "| KeyDiffPress | 0.800 | **0.100** |" in page
    assert "- **Failing** (1 answers): `Broken`" in page
    (unrun,) = (line for line in page.splitlines() if line.startswith("- not run: "))
    assert "KVzipPress" in unrun and "SnapKVPress" in unrun and "KnormPress" not in unrun
    assert "read the context again: none." in page


def test_the_detailed_page_is_that_of_the_recorded_answers():
    docs = Path(__file__).parents[2] / "docs"
    results = docs.parent / "benchmarks" / "results" / "quality" / "answers.jsonl"
    written = (docs / "results-detail.md").read_text(encoding="utf-8")
    images = re.findall(r"!\[(.*?)\]\(quality-\1\.png\)", written)
    assert images and all((docs / f"quality-{name}.png").exists() for name in images)
    text = report.page_text(results, report.summarise_file(results), images)
    assert text == written, "run `moekv bench report --page docs/results-detail.md`"


def test_parts_are_compared_on_the_first_samples():
    rows = [
        *(row(t, i, "moekv", 0.5, 0.1 * 4**i) for t in "ab" for i in range(3)),
        *(row(t, i, "moekv sinks=0", 0.5, 0.3) for t in "ab" for i in range(2)),
        row("a", 0, "moekv recent=0", 0.75, 0.3),
        row("a", 0, "moekv", 0.5, 9.0) | {"cell": {**vars(runner.Cell("a", 900, 0, "moekv", 0.5))}},
    ]
    _, _, *lines = aims.parts(rows, aims.KEPT, 2, [0.5])
    assert lines == [f"| {aims.KEPT['moekv']} | 0.2000 |", "| no sinks | 0.3000 |"]


def test_plots_show_single_ratios_and_leave_out_other_samples(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    rows = [
        *(row("a", i, runner.FULL, 0.0, 0.0) for i in range(2)),
        *(row("a", i, "KnormPress", 0.75, 0.2) for i in range(2)),
        *(row("a", i, "moekv", 0.75, 0.1) for i in range(2)),
        row("a", 0, "KeyDiffPress", 0.75, 0.4),
    ]
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: drawn.append(figure))
    report.plot(report.summarise(rows) | {"overall": []}, tmp_path)
    axis = drawn[0].axes[0]
    shown = {line.get_label(): line.get_ydata().tolist() for line in axis.lines}
    assert shown == {"peers": [pytest.approx(0.2)], "moekv": [pytest.approx(0.1)]}
    assert all(line.get_marker() == "o" for line in axis.lines)
    assert [label.get_text() for label in axis.get_xticklabels()] == ["75%"]

    drawn.clear()
    report.plot(report.summarise(rows) | {"overall": report.overall(rows)}, tmp_path)
    regrets = drawn[1].axes[0]
    assert [label.get_text() for label in regrets.get_yticklabels()] == ["KnormPress", "moekv"]


def test_the_page_has_intervals_of_every_metric():
    rows = [
        *(row("a", i, runner.FULL, 0.0, 0.0, True) for i in range(2)),
        *(row("a", i, "moekv", 0.75, kl, kl < 0.105) for i, kl in enumerate((0.1, 0.11))),
    ]
    meta = {"model": "tiny", "dtype": "", "seed": 0, "machine": "", "versions": {}, "commit": ""}
    page = report.markdown(report.summarise(rows) | {"overall": [], "meta": meta})
    assert (
        "| a | 75% | 0.1049, 0.0572 to 0.1922 | 0.50, 0.09 to 0.91 | 1.00, 0.34 to 1.00 "
        "| 0.21, 0.08 to 0.34 | 0.00, 0.00 to 0.00 |" in page
    )


def measured_targets(rows):
    lines = aims.targets(rows, report.overall(rows))
    return {aim: tuple(rest) for aim, *rest in (x[2:-2].split(" | ") for x in lines[2:])}


def test_targets_say_what_is_met_and_what_is_missed():
    full = [row(t, i, runner.FULL, 0.0, 0.0, True) for t in "abcd" for i in range(2)]
    peers = [
        *(row(t, i, "KnormPress", 0.5, 0.4) for t in "abcd" for i in range(2)),
        *(row(t, i, "KeyDiffPress", 0.5, 0.2) for t in "abcd" for i in range(2)),
        # More samples of a peer than of the others are no reason to compare with it alone.
        *(row(t, 2, "KnormPress", 0.5, 0.001) for t in "abcd"),
    ]
    ours = [
        *(row(t, i, "moekv", 0.5, 0.02, True) for t in "ab" for i in range(2)),
        *(row("c", i, "moekv", 0.5, kl, i == 0) for i, kl in enumerate((0.2, 0.45))),  # mean .3
        *(row("d", i, "moekv", 0.5, kl, False) for i, kl in enumerate((0.25, 0.25))),
    ]
    found = measured_targets([*full, *peers, *ours])
    measured, verdict = found["≤ the best single-prefill peer's, on each task"]
    assert measured.startswith("2 of 4 cells; behind in c at 50% (0.3000; KeyDiffPress 0.2000; ")
    assert "ratio 1.50 (0.01 to 259.15)), d at 50% (0.2500; KeyDiffPress 0.2000; ratio 1.25" in (
        measured
    )
    assert verdict == "**missed** in 1 beyond the intervals"
    measured, verdict = found["≤ 0.2 × the best peer's of each task, geometric mean"]
    assert measured.startswith(f"{(0.1 * 0.1 * 1.5 * 1.25) ** 0.25:.3f} (") and "at 50%" in measured
    assert verdict == "**missed** at 50%"
    measured, verdict = found["exact answers of the full cache that remain at 50 / 75 / 90 %"]
    assert measured.startswith("5 of 8 / ") and verdict.startswith(
        "**missed** (c at 50%: 1 of 2; d at 50%: 0 of 2"
    )
    assert not any("probe" in aim or "KVzip" in aim or "training-free" in aim for aim in found)

    better = [row(t, i, "moekv", 0.5, 0.03, True) for t in "abcd" for i in range(2)]
    others = [
        *(row(t, i, "KVzipPress", 0.5, 0.01) for t in "abcd" for i in range(2)),
        *(row(t, i, aims.PROBE, 0.5, 0.06) for t in "abcd" for i in range(2)),
        *(row(t, i, aims.FREE, 0.5, 0.05) for t in "abcd" for i in range(2)),
    ]
    rows = [*full, *peers, *better, *others]
    longer = [r | {"cell": r["cell"] | {"length": 4000}, "kl": r["kl"] * 2} for r in better]
    far = [r | {"cell": r["cell"] | {"length": 4000}} for r in peers]
    found = measured_targets([*rows, *longer, *far])
    verdicts = {aim: verdict for aim, (_, verdict) in found.items()}
    assert verdicts == {
        "≤ the best single-prefill peer's, on each task": "met",
        "≤ 0.2 × the best peer's of each task, geometric mean": "met",
        "≤ the linear probe's, on each task": "met",
        "the same, geometric mean": "met",
        "≤ KVzip's, geometric mean": "**missed**",
        "exact answers of the full cache that remain at 50 / 75 / 90 %": "met",
        "× the best peer's of each task at 4000 tokens, no more than at 500": "**missed** at 50%",
        "training-free: mean regret lower than that of every peer": "met",
    }
    measured, _ = found["× the best peer's of each task at 4000 tokens, no more than at 500"]
    assert measured == "0.300 (0.30 to 0.30) at 50%, there 0.15"
    # Of the same peers: without the best at the length, there is none at the other.
    weak = [r for r in far if r["cell"]["method"] == "KnormPress"]
    longer[0]["kl"] = 0.001
    measured, verdict = measured_targets([*rows, *longer, *weak])[
        "× the best peer's of each task at 4000 tokens, no more than at 500"
    ]
    assert measured.endswith(f"at 50%, there {0.03 / 0.4:.2f}")
    assert verdict == "met within the intervals"


def test_the_page_has_the_calibration_of_the_packages_router(few_methods, tmp_path, monkeypatch):
    (config,) = report.SHIPPED.glob("*/config.json")
    recipe = json.loads(config.read_text())["recipe"]
    losses = [row["ranking_loss"] for row in recipe["curve"]]
    assert report.calibration_curve(recipe["model_name"]) == recipe["curve"]
    assert min(losses) < losses[0]

    curve = [{"epoch": float(i), "ranking_loss": x} for i, x in enumerate((0.3, 0.1, 0.2))]
    folder = tmp_path / "routers" / "tiny"
    folder.mkdir(parents=True)
    recipe = {"model_name": "tiny", "curve": curve}
    (folder / "config.json").write_text(json.dumps({"recipe": recipe}))
    monkeypatch.setattr(report, "SHIPPED", tmp_path / "routers")
    path = tmp_path / "answers.jsonl"
    rows = [row("a", 0, report.FULL, 0.0, 0.0), row("a", 0, "KnormPress", 0.5, 0.1)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    meta = {"model": "tiny", "dtype": "bfloat16", "seed": 0, "machine": "here", "commit": "abc"}
    path.with_suffix(".meta.json").write_text(json.dumps(meta | {"versions": {"torch": "2"}}))
    page = tmp_path / "page.md"
    rows = [
        {"task": "a", "index": i, "before": i, "ratio": 0.5, "cache_aware": aware, "kl": kl}
        for i in range(3)
        for aware, kl in ((False, 0.2), (True, 0.1 + 0.1 * (i == 0)))
    ]
    measured = {"seed": 0, "samples": 3, "num_experts": 4, "cache_update_interval": 1}
    path.with_name("history.json").write_text(
        json.dumps(measured | {"commit": "abc", "rows": rows})
    )
    written = report.write_report(path, tmp_path / "out", page)
    image = tmp_path / "quality-calibration.png"
    assert image in written and image.stat().st_size > 0
    text = page.read_text()
    assert "| a | 0.200, 0.100 |\n| with / without | **0.500**, 0.500 to 0.500 |\n" in text
    assert "0.3000 with even gates, 0.1000 after epoch 1, which is kept" in text
    assert text.endswith("![quality-calibration](quality-calibration.png)\n")


def test_every_press_of_kvpress_is_measured_or_excused():
    known = {name for name in kvpress.__all__ if name.endswith("Press")}
    known -= {"BasePress", "ScorerPress"}
    used = {
        part.removesuffix("Press")
        for method in presses.PEERS | presses.ANCHORS
        for part in method.replace(")", "").split("(")
    }
    missing = {
        n for n in known if n.removesuffix("Press") not in used and n not in presses.EXCLUDED
    }
    assert missing == set()


def test_presses_of_kvpress_leave_sliding_layers_alone():
    model = tiny_model("gemma3")
    cache = DynamicCache()  # as kvpress takes it, with all pairs of every layer
    with torch.no_grad(), presses.spare_windows(kvpress.KnormPress(0.5))(model):
        model(tokens(1, 40), past_key_values=cache)
    _, layers = find_layers(model)
    kept = [cached.keys.shape[2] for cached in cache.layers]
    assert kept == [40 if is_sliding(layer) else 20 for layer in layers]
    assert {20, 40} == set(kept)
