"""Preference rows by a language model behind an OpenAI-compatible server, as PIT appendix D makes them.

    python -m pit_jax.synthesize --config=configs/synthesize.py --config.base_url=https://api.openai.com/v1 \\
        --config.model=MODEL --output=FOLDER
    python -m pit_jax.synthesize --config=configs/synthesize.py:smoke --config.base_url=http://localhost:8000/v1 \\
        --config.model=MODEL --output=FOLDER

The first makes the paper's 13K rows. A row that is kept has taken five calls at least, a row that is dropped one to
four: count with some 80,000 to 150,000 calls, and try the second first, which makes 20 rows. Then

    python -m pit_jax.train --config=configs/pit_7b.py --config.data.source=file \\
        --config.data.path=FOLDER/rows.jsonl --workdir=RUN

Every field is in `pit_jax.config.SynthesisConfig`. To have the classifier of the paper's second filter, label
FOLDER/to_label.jsonl and start again with --config.labels=FILE: that asks only for the rows that it drops.
"""

import dataclasses

import ml_collections

from pit_jax import config as c


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """`variant`: empty, or smoke: 20 rows."""
    config = c.SynthesisConfig()
    if variant == "smoke":
        config = dataclasses.replace(config, name="synthesize:smoke", num_rows=20)
    elif variant:
        raise ValueError(f"configs/synthesize.py has no variant {variant!r}: use :smoke or none")
    return c.to_config_dict(config)
