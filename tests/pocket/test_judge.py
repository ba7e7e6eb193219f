from __future__ import annotations

import torch

from lorabooth.pocket.dataset import rendered
from lorabooth.pocket.judge import HEADS, HYPER, Judge, agreement, judge_losses, label_table, share
from lorabooth.pocket.trainer import learning_rate


def test_wilson_interval_of_a_known_case() -> None:
    found = share(45, 50)
    assert found.value == 0.9
    assert abs(found.low - 0.7864) < 1e-3
    assert abs(found.high - 0.9565) < 1e-3


def test_judge_learns_and_is_scored_against_the_scenes() -> None:
    torch.manual_seed(0)
    data = rendered(0, "judge", 24)
    judge = Judge(width=8)
    losses = judge_losses(judge, data.images, label_table(data.scenes), seed=0)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=learning_rate(HYPER, 100, 0.0))
    for step in range(30):
        optimizer.zero_grad()
        losses(step)["loss"].backward()
        optimizer.step()
    pixels = torch.from_numpy(data.images).permute(0, 3, 1, 2).float() / 127.5 - 1
    result = agreement(judge, pixels, data.scenes)
    assert set(result) == set(HEADS)
    assert result["place"].value > 0.5


def test_a_pencil_sketch_has_no_colour() -> None:
    data = rendered(0, "judge", 60)
    colours = label_table(data.scenes)["colour"]
    for scene, colour in zip(data.scenes, colours.tolist(), strict=True):
        assert (colour == -100) == (scene.style == "pencil sketch")
