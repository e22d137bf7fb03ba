"""README.md of a packed dataset: what it holds, for people, and where its splits are, for other libraries.

    dataset.json ──▶ [page] ──▶ OUT/README.md ──▶ Hugging Face datasets, hubs of data

`datasets.load_dataset(OUT)` finds the splits in the table at its head. It has no checksum, and nothing here reads it:
whoever likes writes more into it.
"""

from typing import Any

from shards import storage
from shards.format import INDEX_FILE

PAGE_FILE = "README.md"


def write_page(out: str, dataset: dict[str, Any], work: str) -> None:
    """Of the facts of dataset.json."""
    with storage.write_atomic(storage.join(out, PAGE_FILE), work) as file:
        file.write(page(dataset).encode())


def page(dataset: dict[str, Any]) -> str:
    """Markdown under a head of YAML, which lists the shards of each split."""
    head = ["---", "configs:", "- config_name: default", "  data_files:"]
    for split in dataset["splits"]:
        head += [f"  - split: {split}", f"    path: {split}-*.tar"]
    rows = [
        f"| {split} | {facts['images']:,} | {facts['identities']:,} | {facts['shards']:,} |"
        for split, facts in dataset["splits"].items()
    ]
    lines = [
        *head,
        "---",
        "",
        f"# {dataset['name']}",
        "",
        f"Images for re-identification ({dataset['noun']}), packed as WebDataset shards: `KEY.jpg` (or png,",
        "webp) and `KEY.json` with identity, label, camera, view and time, of which -1 and empty are unknown.",
        f"`{INDEX_FILE}` has a row for each image and says where it lies.",
        "",
        "| split | images | identities | shards |",
        "|---|---|---|---|",
        *rows,
        "",
        f"Cameras: {dataset['cameras'] or 'unknown'}. Views: {dataset['views'] or 'unknown'}. Fingerprint: "
        f"`{dataset['fingerprint']}`.",
    ]
    return "\n".join(lines) + "\n"
