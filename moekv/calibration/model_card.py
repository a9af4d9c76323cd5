"""The model card of a saved router, in its folder and on the hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moekv.models.fingerprint import short

if TYPE_CHECKING:
    from moekv.calibration.router import CalibratedRouter

#: Filled in by ``ModelCard.from_template``; `router_id` may be given as the mixin's
#: `model_card_kwargs`.
TEMPLATE = """---
{{ card_data }}
---

# A router of moekv for {{ name }}

moekv compresses KV caches. This router was calibrated for {{ name }}: for every cached key-value
pair it estimates the attention of later tokens.

```python
from moekv import MoERouterPress

press = MoERouterPress(compression_ratio=0.5, router="{{ router_id or "FOLDER OR HUB ID" }}")
with press(model):
    out = model.generate(input_ids, max_new_tokens=100)
```

{% for key, value in facts.items() -%}
- {{ key }}: {{ value }}
{% endfor %}
Models of another architecture, or whose weights are further from these than rounding to 4 bits
takes them, are refused; `moekv calibrate` makes routers for them. `config.json` holds all settings
and the loss after every epoch.
"""


def facts(router: CalibratedRouter) -> dict[str, str]:
    """Return the model of a router, its parts, and how it was fitted."""
    recipe = router.recipe
    found = {
        "fingerprint": f"`{short(router.model)}`",
        "layers": f"{len(router.layers)}, with hidden states of {router.hidden_size} and "
        f"{router.num_kv_heads} KV heads",
        "experts": f"{', '.join(expert.name for expert in router.experts)}, "
        f"of which each token is routed to {router.top_k}",
    }
    if "num_texts" in recipe:
        found["texts"] = f"{recipe['num_texts']}, SHA-256 {recipe['texts_sha256']}..."
    if curve := recipe.get("curve"):
        losses = [row["ranking_loss"] for row in curve]
        found["ranking loss on held-out texts"] = (
            f"{losses[0]:.4f} with even gates, {min(losses):.4f} as trained"
        )
    return found
