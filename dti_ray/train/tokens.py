"""The tokenizer of a run, and its data set's catalogue as tokens.

Stage: before launch, evaluation and benches; free of Ray. In: a configuration and a data set. Out: a `TokenTable`.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from dti_ray.config import RunConfig
from dti_ray.data.interactions import Dataset, read_items
from dti_ray.data.prompts import TokenTable, catalogue_tokenizer, item_texts, stored_tokenizer, token_table
from dti_ray.model.decoder import load_tokenizer
from dti_ray.storage import Storage


def tokenizer_and_table(
    config: RunConfig, storage: Storage, dataset: Dataset
) -> tuple[PreTrainedTokenizerBase, TokenTable]:
    """Return the run's tokenizer (its stored one if it was built from a catalogue) and the tokenised catalogue."""
    texts = item_texts(read_items(dataset), config.prompt.item_template)
    stored = f"runs/{config.train.run}/tokenizer.json"
    if config.model.name_or_path is not None:
        tokenizer = load_tokenizer(config.model.name_or_path, config.model.gguf_file)
    elif storage.exists(stored):
        tokenizer = stored_tokenizer(storage.read(stored).decode(), config.prompt)
    else:
        tokenizer = catalogue_tokenizer(texts, config.prompt)
    return tokenizer, token_table(texts, tokenizer, config.prompt)
