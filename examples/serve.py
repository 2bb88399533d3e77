"""Serves embeddings over TCP while they are loaded, and loaded again, on the same event loop.

    python -m examples.serve

A client sends an id and a newline, and gets the row. Answers keep coming during a load: they are
those of the table before it, until all of it is there.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import numpy as np
import torch
import uvloop

from asyncloader import HashTable, Loader
from examples.made_up import random_table
from tests.oracle import write_checkpoint


class EmbeddingServer:
    """Answers from one table, which may change underneath."""

    def __init__(self, table: HashTable) -> None:
        self._table = table

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one client."""
        while line := await reader.readline():
            row = self._table(torch.tensor([int(line)]))[0]
            writer.write(" ".join(f"{value:.6g}" for value in row.tolist()).encode() + b"\n")
            await writer.drain()
        writer.close()


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, id_: int) -> str:
    """Be a client, and return the row of an id."""
    writer.write(f"{id_}\n".encode())
    return (await reader.readline()).decode().strip()


async def serve(checkpoint: Path, id_: int) -> None:
    """Serve, ask, load, and ask again."""
    table = HashTable([4], name="item_emb")
    loader = Loader(checkpoint, hashtables={"item_emb": table})
    server = await asyncio.start_server(EmbeddingServer(table).answer, "127.0.0.1", 0)
    async with server:
        client = await asyncio.open_connection(*server.sockets[0].getsockname())
        print(f"before the load   {id_}: {await ask(*client, id_)}")
        async with asyncio.TaskGroup() as group:
            loading = group.create_task(loader.aload())
            answers = 0
            while not loading.done():
                await ask(*client, id_)
                answers += 1
        print(f"during the load   {answers} answers")
        print(f"after the load    {id_}: {await ask(*client, id_)}")
        print(f"a newer one       {await loader.aload()}")  # ids that were there are replaced
        client[1].close()
        await client[1].wait_closed()


def main() -> None:
    """Write a small checkpoint, and serve it."""
    data = random_table(np.random.default_rng(7), 200_000, width=4)
    with tempfile.TemporaryDirectory(prefix="asyncloader-serve-") as folder:
        write_checkpoint(Path(folder), {"item_emb": data}, {}, ranks=2)
        uvloop.run(serve(Path(folder), int(data.ids[0])))


if __name__ == "__main__":
    main()
