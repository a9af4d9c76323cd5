"""The page of what stayed, in a browser: its numbers, its keys, and no complaints."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import evaluate
from character_tokenizer import character_tokenizer
from tiny_models import tiny_model
from torch import Tensor

from moekv import Expert, LayerView, MoERouterPress

TEXT = "</script><b>The tide & 'the' \"causeway\"</b>\nIt covers it twice a day. " * 2


class Named(Expert):
    """An expert with a name that wants to be markup."""

    name = "<i>mine</i>"

    def scores(self, view: LayerView) -> Tensor:
        return view.keys.norm(dim=-1)


@pytest.fixture(scope="module")
def pressed() -> tuple[MoERouterPress, Tensor]:
    """A press that has recorded two rows, the second of them padded."""
    model, tokenizer = tiny_model(), character_tokenizer()
    ids = torch.tensor([tokenizer(TEXT).input_ids] * 2)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    press = MoERouterPress(experts=[Named(), "semantic"], budget="model")
    with press(model, record=True), torch.no_grad():
        model(ids, attention_mask=mask)
    return press, ids


@pytest.fixture(scope="module", params=[0, 1])
def row(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def page(
    pressed: tuple[MoERouterPress, Tensor], row: int, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    press, ids = pressed
    path = tmp_path_factory.mktemp("page") / "report.html"
    press.report(path, character_tokenizer(), ids, row=row)
    return path


def data_of(page: Path) -> dict[str, Any]:
    (found,) = re.findall(r"^const data = (.*);$", page.read_text(), re.MULTILINE)
    data: dict[str, Any] = json.loads(found)
    return data


def test_the_data_are_the_record(
    page: Path, row: int, pressed: tuple[MoERouterPress, Tensor]
) -> None:
    recording, data = pressed[0].recording(), data_of(page)
    start = recording.starts[row]
    assert start == [0, 9][row]
    assert "".join(data["pieces"]) == TEXT[start:]
    assert data["experts"] == ["<i>mine</i>", "semantic"]
    assert (data["sinks"], data["recent"], data["budget"]) == (4, 16, "model")
    numbers = torch.frombuffer(bytearray(base64.b64decode(data["spoken"])), dtype=torch.int16)
    spoken = numbers.view(2, 2, len(TEXT) - start)
    for number, layer in enumerate(recording.layers):
        kept, speakers = layer.kept[row, :, start:], layer.speakers[row, :, start:]
        for expert in range(2):
            assert torch.equal(spoken[number, expert], (kept & (speakers == expert)).sum(0).short())
        assert data["layers"][number]["kept"] == kept.sum(-1).tolist()
        assert data["layers"][number]["weights"] == pytest.approx(layer.weights[row].tolist())


def test_the_page_is_whole_by_itself(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"https?:|src=|@import|url\(", text)
    # The text of the document is data, and no markup: the only scripts are the page's own.
    assert text.count("</script>") == 1 and text.count("<b>") == 0
    assert "<i>mine" not in text


def test_what_a_browser_shows(page: Path, row: int) -> None:
    data = data_of(page)
    shown = evaluate(
        page,
        """
        const texts = (what) => [...document.querySelectorAll(what)].map((x) => x.textContent);
        result = {
          facts: texts("#facts dd"), press: texts("#press")[0],
          text: texts("#text")[0], tokens: texts("#text span").length,
          rows: texts("#map th[scope=row]"), cells: texts("#map td[data-layer]"),
          layers: texts("#map thead button"),
          marks: document.querySelectorAll("#text b, i b").length,
          none: document.querySelectorAll("#text .none").length,
        };
        """,
    )
    length = len(data["pieces"])
    kept = sum(sum(layer["kept"]) for layer in data["layers"])
    assert shown["text"].replace("\u21b5\n", "\n") == "".join(data["pieces"])
    assert shown["tokens"] == length and shown["marks"] == 0
    assert shown["facts"][0].startswith(str(length))
    assert f"{kept} of {2 * 2 * length}" in shown["facts"][1]
    assert "all 2 rows" in shown["facts"][2] and f"row {row}" in shown["facts"][2]
    assert shown["press"] == data["press"]
    assert shown["rows"] == ["head 0", "head 1", "all heads", "<i>mine</i>", "semantic"]
    assert shown["layers"] == ["0", "1"]
    first = [round(100 * layer["kept"][0] / length) for layer in data["layers"]]
    assert [int(x) for x in shown["cells"][:2]] == pytest.approx(first, abs=1)
    weights = [100 * layer["weights"][1] for layer in data["layers"]]
    assert [int(x) for x in shown["cells"][-2:]] == pytest.approx(weights, abs=1)
    assert 0 < shown["none"] < length


def test_keys_move_and_describe(page: Path, pressed: tuple[MoERouterPress, Tensor]) -> None:
    data = data_of(page)
    numbers = torch.frombuffer(bytearray(base64.b64decode(data["spoken"])), dtype=torch.int16)
    spoken = numbers.view(2, 2, -1)
    shown = evaluate(
        page,
        """
        const press = (key) => (document.activeElement ?? document.body).dispatchEvent(
          new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
        const said = () => byId("what").textContent + " | " + byId("who").textContent;
        const all = [...document.querySelectorAll("#text span")];
        const stops = () => all.filter((x) => x.tabIndex === 0).length;
        const note = (what, right) => result.push([what, current, chosen, said(), stops(), right]);
        result = [];
        spans[0].focus();
        const keys = "ArrowRight ArrowRight ArrowLeft ] End Home ArrowUp ArrowDown".split(" ");
        for (const key of keys) {
          press(key);
          note(key, document.activeElement === spans[current]);
        }
        byId("layer").value = 2;
        byId("layer").dispatchEvent(new Event("input"));
        note("slider", byId("layer").getAttribute("aria-valuetext") === "layer 1");
        document.querySelectorAll("#map thead button")[1].click();
        note("button", byId("chosen").textContent === "all layers");
        """,
    )
    last = len(data["pieces"]) - 1
    at = {key: (piece, layer) for key, piece, layer, *_ in shown[2:]}
    assert [step[1] for step in shown[:3]] == [1, 2, 1]
    assert at["]"] == (1, 1) and at["End"] == (last, 1) and at["Home"] == (0, 1)
    assert at["ArrowUp"] == (0, 1) and 0 < at["ArrowDown"][0] < last
    assert at["slider"][1] == 2 and at["button"][1] == 0
    for key, piece, layer, said, stops, right in shown:
        assert stops == 1 and right, key
        among = spoken if layer == 0 else spoken[layer - 1 : layer]
        heads = 2 * len(among)
        kept = int(among[:, :, piece].sum())
        assert f"token {piece}: kept by {kept} of {heads} heads" in said
        for expert, name in enumerate(data["experts"]):
            count = int(among[:, expert, piece].sum())
            assert (f"{name} ({count})" in said) == (count > 0)


def test_the_focus_is_never_behind_the_bars(page: Path) -> None:
    """On a low screen, each token that the keys reach is below the slider, above the last line."""
    places = evaluate(
        page,
        """
        const edge = (id) => byId(id).getBoundingClientRect();
        result = [];
        for (const step of [1, -1]) {
          for (let i = step > 0 ? 0 : spans.length - 1; i >= 0 && i < spans.length; i += step) {
            moveTo(i, true);
            const here = spans[i].getClientRects()[0];
            result.push([here.top - edge("choice").bottom, edge("detail").top - here.bottom]);
          }
        }
        """,
        "--window-size=700,420",
    )
    assert min(min(place) for place in places) >= 0


@pytest.mark.parametrize("scheme", ["0", "1"], ids=["dark", "light"])
def test_text_can_be_read_on_every_shade(page: Path, scheme: str) -> None:
    """Contrast of at least 4.5, as the guidelines for accessible content want it."""
    ratios = evaluate(
        page,
        """
        const canvas = document.createElement("canvas").getContext("2d", {
          willReadFrequently: true });
        const light = (color) => {
          canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
          const linear = (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
          const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((x) => linear(x / 255));
          return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        result = [];
        for (let share = 0; share <= 100; share += 5) {
          shade(spans[0], share);
          const style = getComputedStyle(spans[0]);
          const paper = light(style.backgroundColor);
          const [a, b] = [light(style.color), paper].sort((x, y) => y - x);
          result.push([share, (a + 0.05) / (b + 0.05), paper,
            style.borderBottomWidth, style.textDecorationLine]);
        }
        """,
        f"--blink-settings=preferredColorScheme={scheme}",
    )
    assert min(ratio for _, ratio, *_ in ratios) >= 4.5
    shades = [shade for _, _, shade, *_ in ratios]
    assert shades == sorted(shades, reverse=scheme == "1")  # one way, so that grey tells as much
    assert (shades[0] > 0.5) == (scheme == "1")
    widths = [float(width.removesuffix("px")) for *_, width, _ in ratios]
    assert widths == sorted(widths) and set(widths) == {0, 1, 2, 3}
    assert [line for *_, line in ratios] == ["line-through"] + ["none"] * 20
