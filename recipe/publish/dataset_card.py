"""The dataset card of a prepared folder, which makes it a Hub dataset as it is."""

from __future__ import annotations

from typing import Any

from huggingface_hub import DatasetCardData

FINEWEB_REPO = "HuggingFaceFW/fineweb"


def dataset_card(index: dict[str, Any]) -> str:
    """README.md for a prepared folder with this index."""
    source = index["source"]["name"]
    if source.partition("@")[0].partition(":")[0] == FINEWEB_REPO:
        licence = {"license": "odc-by"}
        origin = f"[FineWeb](https://huggingface.co/datasets/{FINEWEB_REPO}) by Hugging Face (`{source}`)"
        terms = (
            "FineWeb is released by Hugging Face under the Open Data Commons Attribution License (ODC-By) 1.0, which holds "
            "for these tokens as well; its use is also subject to Common Crawl's terms of use."
        )
    else:
        licence = {"license": "other", "license_name": "licence-of-the-source"}
        origin = f"`{source}`"
        terms = "The licence of the source text applies to these tokens."
    metadata = DatasetCardData(
        **licence, task_categories=["text-generation"], tags=[index["format"], "tokenized"], viewer=False
    )
    tokenizer = f"`{index['tokenizer']}`" if index["tokenizer"] else "the tokenizer in `tokenizer/`"
    return f"""---
{metadata.to_yaml()}
---

# {source} as tokens

{index["tokens"]:,} tokens in {index["documents"]:,} documents of {origin}, made with {tokenizer} (vocabulary
{index["vocab_size"]:,}), for pretraining with gpt2-recipe: `python scripts/pretrain.py CONFIG.yaml --data THIS_DATASET`, by its
Hub id or as a folder, trains on the same rows as on the text.

## Licence

{terms}

## Format

- `index.json`: format `{index["format"]}`, version {index["version"]}; where the tokens of each unit of the source lie, and
  size and SHA-256 of every file.
- `tokens-*.bin`: token ids, {index["dtype"]}, little endian, document after document in the order of the source, the
  end-of-text id {index["end_of_text"]} in front of each.
- `documents-*.bin`: for each document of the tokens file its number of tokens and its size in UTF-8, both uint32, little
  endian. There are no ids or URLs: the documents of a unit are those of its row group or byte range in the source, without
  the empty ones.
- `tokenizer/`: the tokenizer. `validation/`: the same files for the validation split, if the source has one.
"""
