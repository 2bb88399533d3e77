"""What newcomers run and copy works as it stands."""

from __future__ import annotations

import ast
import asyncio
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from asyncloader import HashTable, Saver
from examples.made_up import random_table, random_tensor
from tests.oracle import TableData, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_demo_finds_every_bit_where_it_was_written() -> None:
    out = run("examples.demo")
    for what in ("bit for bit", "item_emb", "user_emb", "ad_emb", "GB/s", "worst", "all verified"):
        assert what in out


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (1, 3)])
def test_the_training_script_takes_its_share(rank: int, ranks: int) -> None:
    out = run("examples.train", str(rank), str(ranks))
    match = re.search(r"([\d,]+) of 20,000", out)
    assert match is not None
    share = int(match[1].replace(",", "")) / 20_000
    assert share == pytest.approx(1 / ranks, abs=0.02)


def test_a_training_that_is_resumed_as_the_page_says_goes_on_as_if_it_had_not_ended(
    tmp_path: Path,
) -> None:
    page = (ROOT / "docs" / "saving.md").read_text()
    section = page.partition("## The dense optimizer")[2]
    code = section.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102  # what the page says

    def start() -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.Tensor]:
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
        return model, torch.optim.AdamW(model.parameters(), lr=0.1), torch.tensor(0)

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: torch.Tensor) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.full((2, 4), float(step))).sum().backward()
            optimizer.step()
            step += 1

    first, second = start(), start()
    train(*first)
    names["save"](tmp_path, *first)
    names["resume"](tmp_path, *second)
    assert second[2] == 3
    train(*first)
    train(*second)
    pairs = zip(first[0].parameters(), second[0].parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def run_code(page: Path, folder: Path) -> dict[str, object]:
    """Run the Python on a page, from top to bottom, with all that it takes in a folder."""
    rng = np.random.default_rng(1)
    full = random_table(rng, 1000, 16)
    slots = {name: full.slots[name] for name in ("embedding", "sparse_adamw_exp_avg")}
    table = TableData(ids=full.ids, slots=slots)
    tensors = {"w": random_tensor(rng, (2, 2))}
    write_checkpoint(folder / "checkpoint", {"item_emb": table}, tensors)
    write_checkpoint(folder / "old", {"item_emb_2024": table}, {})
    shutil.copytree(folder / "checkpoint", folder / "run" / "1200")
    save_file({"w": torch.ones(3)}, folder / "model.safetensors")
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        text = block.replace("/path/to", str(folder))
        code = compile(text, page.name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        result = eval(code, names)  # noqa: S307  # the page's own code
        if result is not None:  # it awaits something
            asyncio.run(result)
    return names


def test_the_code_in_the_readme_runs_in_its_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run_code(ROOT / "README.md", tmp_path)
    assert "1200 torch.Size([2, 2])" in capsys.readouterr().out
    assert names["newest"] == tmp_path / "run" / "1200"
    assert (tmp_path / "new" / "index").exists()


def test_the_code_on_loading_runs_in_its_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Saver(
        path=tmp_path / "new",
        hashtables={"item_emb": HashTable([16], name="item_emb")},
        tensors={"w": torch.ones(2, 2)},
    ).save()
    names = run_code(ROOT / "docs" / "loading.md", tmp_path)
    assert len(cast("HashTable", names["fresh"])) == 1000
    assert "about 1,000 rows" in capsys.readouterr().out


def test_the_code_on_tables_runs_in_its_order(tmp_path: Path) -> None:
    names = run_code(ROOT / "docs" / "tables.md", tmp_path)
    assert cast("HashTable", names["users"]).ids().tolist() == [65536]
    assert cast("HashTable", names["merged"]).ids(child="brand").tolist() == [7]


async def test_the_code_in_the_guide_to_serving_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(1)
    content = random_table(rng, 100, 16)
    tensors = {
        "w": random_tensor(rng, (4, 4)),
        "tower.weight": random_tensor(rng, (1, 16)),
        "tower.bias": random_tensor(rng, (1,)),
    }
    write_checkpoint(tmp_path / "run" / "1200", {"item_emb": content}, tensors)
    text = (ROOT / "docs" / "serving.md").read_text()
    first, module, service, second, *_ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    for block in (first, module, service, second):
        exec(block.replace("/path/to", str(tmp_path)), names)  # noqa: S102  # the guide's own code
    await names["serve"](content.ids[:2])
    assert "1200 True" in capsys.readouterr().out
    async with names["lifespan"](names["app"]):
        answer = await names["rank"](content.ids[:3].tolist())
        assert answer["version"] == "1200"
        assert len(answer["scores"]) == 3
        with pytest.raises(names["HTTPException"], match="no version served before"):
            await names["rollback"]()


def test_each_row_of_what_was_tried_is_a_test() -> None:
    """`test_x.py`: `part of a name`, `part of another`; as -k takes it."""
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and ".py`: " in line]
    assert len(rows) > 40
    for row in rows:
        for file, names in re.findall(r"`(test_\w+\.py)`: ((?:`\w+`(?:, )?)+)", row):
            defined = re.findall(
                r"^(?:async )?def (test_\w+)",
                (ROOT / "tests" / file).read_text("utf-8"),
                re.MULTILINE,
            )
            for part in re.findall(r"`(\w+)`", names):
                assert any(part in name for name in defined), (file, part)


async def test_the_code_in_the_guide_to_disk_tables_runs(tmp_path: Path) -> None:
    names = await asyncio.to_thread(run_code, ROOT / "docs" / "disk-tables.md", tmp_path)
    rows = await cast("Callable[[], Awaitable[torch.Tensor]]", names["serve"])()
    assert rows.shape == (2, 2, 16)
    assert not rows[1, 1].any()
    rows = await cast("Callable[[], Awaitable[torch.Tensor]]", names["follow"])()
    assert rows.shape == (2, 16)
