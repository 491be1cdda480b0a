"""Write docs/configuration.md from the schemas: ``python docs/make_configuration.py``. A test says when it is due."""

from pathlib import Path

from dinocell.configs.docs import document
from dinocell.demo.data import DemoConfig
from dinocell.finetune.config import FinetuneConfig
from dinocell.ssl.config import PretrainConfig

INTRODUCTION = """# Configuration

A command's settings are a frozen dataclass (the schema), with defaults. A recipe holds what differs; the command line
adds `key=value`:

```
dinocell demo quick seed=3 field.photons=200.0
```

- A recipe is the bare name of a shipped one (`dinocell/configs/<command>/<name>.yaml`) or the path of a YAML file.
- Every value is checked where it is written, and nothing is converted on a guess: `3.0` is no integer, `1` no boolean.
  Of a list of texts, one alone needs no brackets: `data.shards=shards/jump`.
- `${key}` refers to another key, `${oc.env:NAME}` to an environment variable; `???` marks what its user
  sets.
- Mistakes are one line and exit code 2:

```text
dinocell: override 'field.fotons=200': field.fotons: unknown key; did you mean 'field.photons'?
```

What was resolved is written to `config.yaml` in the run folder, and can be given back as a recipe.
"""

SCHEMAS = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "demo": DemoConfig}

if __name__ == "__main__":
    Path(__file__).with_name("configuration.md").write_text(document(INTRODUCTION, SCHEMAS), encoding="utf-8")
