"""What the metrics are called, which way is better, and what they mean in plain words. Imports nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Legend:
    """One metric's place in a table.

    Attributes:
        key: its name in `Scores`.
        title: its name to people.
        higher_is_better: which way it should go.
        backbone: what it is measured with: "dino", "clip" or "lpips", as in `Backbones.names`.
        question: what it answers, in a few words.
        explanation: how, in a sentence or two.
    """

    key: str
    title: str
    higher_is_better: bool
    backbone: str
    question: str
    explanation: str

    @property
    def heading(self) -> str:
        """The title with an arrow that points where it should go."""
        return f"{self.title} {'↑' if self.higher_is_better else '↓'}"


METRICS = (
    Legend(
        "dino",
        "DINO",
        True,
        "dino",
        "Is it this very subject?",
        "Mean cosine between the drawn images and the photos, seen by a network that tells individuals "
        "apart. The photos' own value is the best to be hoped for; more than that means copies of them.",
    ),
    Legend(
        "clip_i",
        "CLIP-I",
        True,
        "clip",
        "Does it look like the photos?",
        "The same with CLIP, which sees the class, colours and scenery rather than the individual.",
    ),
    Legend(
        "clip_t",
        "CLIP-T",
        True,
        "clip",
        "Does it show what the prompt says?",
        "Cosine between each image and its prompt, both seen by CLIP. The prompt is compared without the "
        "rare token, which means nothing to CLIP.",
    ),
    Legend(
        "pres",
        "PRES",
        False,
        "dino",
        "Has the class become the subject?",
        "Mean cosine between images of any member of the class, drawn without the token, and the subject's "
        "photos. Near the base's own value: the class is still itself.",
    ),
    Legend(
        "div",
        "DIV",
        True,
        "lpips",
        "Do images of one prompt differ?",
        "Mean perceptual distance between the images of one prompt, over all pairs. Low: the same picture "
        "again and again.",
    ),
    Legend(
        "drift",
        "drift",
        False,
        "lpips",
        "Is everything else unchanged?",
        "Perceptual distance between what the base draws of other things and what it draws with the adapter "
        "on, same prompt and same noise. Zero: untouched.",
    ),
)
"""In the order of a table's columns, which is that of `Scores`."""
