"""The model card: what the exported net is, and where it comes from."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from hookline import config

if TYPE_CHECKING:
    from hookline import Trainer

LOADING = {
    "pt2": 'net = torch.export.load("model.pt2").module()',
    "onnx": 'session = onnxruntime.InferenceSession("model.onnx")',
    "safetensors": 'safetensors.torch.load_model(net, "model.safetensors")  # a net of the same class',
}


def card(trainer: Trainer, module: str, forms: Sequence[str], weights: Mapping[str, Any], counters: Any) -> str:
    """Return a card in Markdown."""
    numbers = sum(one.numel() for one in weights.values() if torch.is_tensor(one))
    own = metadata.version("hookline")
    versions = {"hookline": own, "torch": torch.__version__, "python": platform.python_version()}
    plain = json.loads(json.dumps(trainer.config, default=str))
    rows = {
        "made from": f"`{module}` of `{type(trainer.module).__module__}.{type(trainer.module).__qualname__}`",
        "numbers in its weights": f"{numbers:,}",
        "run": f"`{trainer.run_dir.name}`",
        "trained for": f"{counters.global_step} steps, {counters.epochs} epochs, {counters.samples} samples",
        **{f"{name} version": version for name, version in versions.items()},
    }
    measured = table("metric", trainer.metrics) if trainer.metrics else "It has not been evaluated."
    return f"""# {trainer.options.run_name}

{table("about", rows)}

## Load

```python
{chr(10).join(LOADING[form] for form in forms)}
```

## Metrics

Of the last evaluation, on the validation data of the module.

{measured}

## Data and hyper-parameters

```yaml
{config.to_yaml(plain).rstrip()}
```
"""


def table(head: str, rows: Mapping[str, Any]) -> str:
    """Return a table of two columns."""
    return "\n".join([f"| {head} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
