"""Takes up training from a checkpoint that another number of ranks wrote.

    python -m examples.train [RANK RANKS]

Each rank makes its model, gives its tables the slice of ids that is its own, and loads. Of a block
that holds ids of several ranks it takes what belongs to it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from asyncloader import HashTable, Loader, Saver, gen_slice
from examples.made_up import filled_table, random_table

WRITERS = 4
IDS = 20_000


class Model(torch.nn.Module):
    """Sums up the embeddings of a user's items, and scores the sum."""

    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__()
        self.item_emb = HashTable([16], name="item_emb", slice=gen_slice(rank, ranks))
        self.item_emb.add_slot("sparse_adamw_exp_avg", [16])
        self.item_emb.add_slot("sparse_adamw_exp_avg_sq", [16])
        self.score = torch.nn.Linear(16, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Score users by their items, `[users, items]`."""
        score: torch.Tensor = self.score(self.item_emb(ids).sum(dim=1))
        return score


def resume(checkpoint: Path, rank: int, ranks: int) -> Model:
    """Return the model of one rank as it stands in the checkpoint."""
    model = Model(rank, ranks)
    loader = Loader(
        checkpoint,
        hashtables={"item_emb": model.item_emb},
        tensors=model.state_dict(),  # the parameters' own memory
        strict=True,
    )
    print(f"rank {rank} of {ranks}: {loader.load()}")
    return model


def main() -> None:
    """Write a checkpoint as four ranks would, and resume as one rank of another number."""
    rank, ranks = (int(number) for number in sys.argv[1:] or ("1", "3"))
    table = random_table(np.random.default_rng(7), IDS, width=16)
    dense = Model(0, 1).state_dict()
    with tempfile.TemporaryDirectory(prefix="asyncloader-train-") as folder:
        for writer in reversed(range(WRITERS)):  # rank 0 last: it waits for the others
            mine = filled_table("item_emb", table, gen_slice(writer, WRITERS))
            Saver(
                writer,
                WRITERS,
                path=folder,
                hashtables={"item_emb": mine},
                tensors=dense,
                save_id="example",
            ).save()
        model = resume(Path(folder), rank, ranks)
    held = model.item_emb.ids()
    print(f"{len(held):,} of {IDS:,} ids are this rank's")
    print(f"scores of two users: {model(held[:6].view(2, 3)).flatten().tolist()}")


if __name__ == "__main__":
    main()
