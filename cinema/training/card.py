"""The model card that lies beside a run's checkpoints and in the folder of its weights."""

import platform
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from huggingface_hub import ModelCardData

from cinema.files import write_text

if TYPE_CHECKING:
    from cinema.training.loop import Run

CARD = """---
{facts}
---

# {name}

{about} Trained by `cinema train`, {step:,} of {total:,} steps, {hours:.1f} hours on {machine}.

- **Data**: {data}
- **Base**: {base}
- **Intended use**: learning how short movies are generated, and research on it
- **Limits**: only what the data shows. Nothing here was checked for people, places or events outside of it.
- **Licence**: {licence}

## Last figures

{figures}

## Configuration

```yaml
{config}```
"""


def write_card(run: "Run", folder: Path) -> None:
    """Write `README.md` in a folder: data, steps, configuration, figures, use, limits, and the licence of the base."""
    config, told = run.config, run.task.card()
    told_config = config.model_dump(mode="json", exclude_defaults=True)
    for said in (told_config, told_config["options"] if config.options else {}):
        said |= {
            k: Path(v).name for k, v in said.items() if isinstance(v, str) and Path(v).exists()
        }  # paths are private
    init = told_config.get("init")
    base = init or "none, trained from nothing"
    licence = "that of the base binds these weights, too" if config.init else "Apache-2.0, as the code"
    tags = ["captain-cinema", config.task]
    facts = ModelCardData(base_model=init, tags=tags, license="other" if init else "apache-2.0")
    hours = sum(line.get("seconds", 0.0) for line in run.log) / 3600
    figures = "".join(f"- {name}: {value:g}\n" for name, value in (run.log[-1] if run.log else {}).items())
    processes, device = run.accelerator.num_processes, run.accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"a CPU ({platform.machine()})"
    machine = f"{name}, {processes} processes" if processes > 1 else name
    # fmt: off
    text = CARD.format(
        facts=facts.to_yaml().strip(), name=run.out.name, step=run.step, total=config.total_steps, hours=hours,
        machine=machine, base=base, licence=licence, figures=figures or "none yet\n", **told,
        config=yaml.safe_dump(told_config, sort_keys=False),
    )
    # fmt: on
    write_text(folder / "README.md", text)
