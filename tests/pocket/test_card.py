from __future__ import annotations

from pathlib import Path

from lorabooth.pocket.card import with_section, write_card

SHARE = {"value": 0.925, "low": 0.89, "high": 0.95, "right": 37, "total": 40}
SHARES = {"class": SHARE, "place": SHARE, "colour": SHARE}
FIGURES = {
    "sample_count": 40,
    "steps": 20,
    "guidance": 4.0,
    "samples": SHARES,
    "targets": {"class": 0.9, "place": 0.9, "colour": 0.8},
    "judge": {"through_vae": SHARES, "vae_psnr_db": 28.33},
}
BUILD = {
    "seed": 0,
    "scenes": 60000,
    "device": "a processor",
    "phases": [{"phase": "unet", "steps": 12, "minutes": 1.5, "hyper": {"lr": 1e-3}, "batch": 48}],
    "notes": "A note.",
    "commit": "abc",
    "versions": {"torch": "2", "diffusers": "0.42", "transformers": "5"},
    "parameters": {"UNet": 5_400_000},
    "size_mb": 14.6,
}


def test_card_states_the_measured_figures(tmp_path: Path) -> None:
    text = write_card(tmp_path, FIGURES, BUILD).read_text(encoding="utf-8")
    assert "92.5% (89.0% to 95.0%)" in text
    assert "28.33 dB" in text
    assert "| unet | 12 | 1.5 | 0.001 | 48 |" in text
    assert "A note." in text
    assert "{" not in text


def test_a_section_is_put_in_once_and_others_stay() -> None:
    card = "# Base\n\ntext\n\n## Use\n\nso\n"
    once = with_section(card, "\n## Subject encoder\n\nfirst\n")
    assert once == card + "\n## Subject encoder\n\nfirst\n"
    between = once + "\n## Recipe\n\nrest\n"
    again = with_section(between, "\n## Subject encoder\n\nsecond\n")
    assert again == card + "\n## Subject encoder\n\nsecond\n\n## Recipe\n\nrest\n"
