"""What stage 1 hands to stage 2: `stage1.safetensors` in the run folder.

    stage 1 ──▶ tokens, text features ──▶ [stage1_result] ──▶ stage 2 of this run, or of others (`stage1.result`)

The file has all identities' rows. It is written and read in pieces: a rank holds its own rows of it.
"""

import json
from dataclasses import dataclass
from typing import IO, Any

from clipreid.errors import ModelError
from clipreid.identity_table import IdentityTable
from clipreid.peers import ALONE, Peers
from clipreid.stage1 import TEXT_FEATURES
from clipreid.weights.sealed import Header, check_file, dump
from clipreid.weights.tables import TOKENS, read_table
from cluster.errors import ConfigError
from cluster.ranks.team import Team
from cluster.run.run_folder import STAGE1_RESULT
from cluster.run.storage import Storage
from cluster.training.gathered import on_first_with_tables
from shards.storage import open_read, size_bytes

STORED_TOKENS = "tokens"


@dataclass
class Stage1Result:
    """Of one run of stage 1, and what stage 2 has to have in common with it."""

    tokens: IdentityTable
    """float32 [N, M, W]."""
    text_features: IdentityTable
    """float32 [N, D]."""
    label_names: list[str]
    """Source identity of each label 0 … N-1."""
    fingerprint: str
    """Of the dataset."""
    encoder: str
    """Of the image encoder's weights before training, which the tokens were fitted to."""

    def write(self, storage: Storage, team: Team) -> None:
        """By all ranks together. Raises TrainingError where the storage cannot be written."""
        facts = {"label_names": self.label_names, "fingerprint": self.fingerprint, "encoder": self.encoder}

        def write(whole: Any) -> None:
            tensors = {STORED_TOKENS: whole[self.tokens.name], TEXT_FEATURES: whole[self.text_features.name]}
            with storage.writing(STAGE1_RESULT):
                storage.write_pieces(STAGE1_RESULT, dump(tensors, {"stage1": json.dumps(facts)}))

        on_first_with_tables(team, (self.tokens, self.text_features), write, "write stage 1's result")

    @classmethod
    def read(cls, source: str, peers: Peers = ALONE) -> "Stage1Result":
        """This rank's rows. Raises FileNotFoundError, and ModelError where it is no such file or not as it was
        written."""
        with open_read(source) as file:
            header = check_file(file, size_bytes(source), source)
            try:
                return cls(*_tables(file, header, peers), **json.loads(header.metadata["stage1"]))
            except (LookupError, ValueError, TypeError) as error:
                raise ModelError(
                    f"{source}: is no result of stage 1 ({type(error).__name__}: {error}): give the "
                    "stage1.safetensors of a run"
                ) from None

    def __post_init__(self) -> None:
        if not self.tokens.num_identities == self.text_features.num_identities == len(self.label_names):
            raise ValueError("tokens, text features and names differ in number")

    def check_fits(self, source: str, fingerprint: str, encoder: str, prompt_tokens: int) -> None:
        """Raises ConfigError where stage 2 would go on from another dataset, encoder or number of tokens."""
        faults = []
        if self.fingerprint != fingerprint:
            faults.append(f"{source} was learned on dataset {self.fingerprint}, data.shards is {fingerprint}")
        if self.encoder != encoder:
            faults.append(
                f"{source} was learned with image encoder {self.encoder}, this run starts with {encoder}: use the same "
                "model.arch, model.pretrained, model.image_size, model.stride and run.seed"
            )
        if (tokens := self.tokens.block.shape[1]) != prompt_tokens:
            faults.append(f"{source} has {tokens} tokens per identity, model.prompt_tokens is {prompt_tokens}")
        if faults:
            raise ConfigError("\n".join(faults))


def _tables(file: IO[bytes], header: Header, peers: Peers) -> tuple[IdentityTable, IdentityTable]:
    tokens = read_table(file, header.places[STORED_TOKENS], TOKENS, peers)
    texts = read_table(file, header.places[TEXT_FEATURES], TEXT_FEATURES, peers)
    return tokens, IdentityTable.frozen(TEXT_FEATURES, texts.num_identities, texts.block.detach(), peers)
