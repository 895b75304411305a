"""What the small Defender's vision tower is trained with: a probe that names what its image tokens show, in the words' own embeddings.

Shapes: B pictures, P image tokens (4 x 4 cells), H width, A words.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from aot_fast.bootstrap.folders import build_tokenizer
from aot_fast.bootstrap.rows import CELLS
from aot_fast.data.scenes import COLORS, SHAPES, Scene

PLACES = ("left", "right", "above", "below")
ATTRIBUTES = (*COLORS, *SHAPES, *PLACES)
"""Words that a cell's object answers to; of the places, those on whose side of the middle it lies."""
NUM_COLORS, NUM_NAMES = len(COLORS), len(COLORS) + len(SHAPES)
WORD_GROUPS = ((0, NUM_COLORS), (NUM_COLORS, NUM_NAMES), (NUM_NAMES, NUM_NAMES + 2), (NUM_NAMES + 2, NUM_NAMES + 4))
"""Colours, shapes, left or right, above or below: one of each is true of an object."""
PROBE_SCALE = 10.0
"""Inverse temperature of the cosine between an image token and a word: low, so that only real likeness satisfies the probe."""
FEATURE_LENGTH = 5.0
"""Mean norm of an image token where the language model begins; a word's is about 1."""


class WithProbe(nn.Module):
    """The Defender beside a probe on its image tokens: what stands in each cell, and where. The probe is thrown away.

    From the answers alone a vision tower starts to see only after thousands of steps. Colours and shapes are probed with the embeddings of
    their own words, so that a picture's tokens come to lie beside the words for what they show.
    """

    def __init__(self, defender: Qwen2_5_VLForConditionalGeneration):
        super().__init__()
        self.defender = defender
        self.words = word_tokens(" ")
        self.probe = nn.Linear(defender.config.text_config.hidden_size, 3)
        self.register_buffer("length", torch.tensor(1.0))

    def read(self, features_BPH: Tensor) -> Tensor:
        """Logits of attributes and presence, and the centre, [B, P, attributes + 3]."""
        words = F.normalize(self.defender.get_input_embeddings().weight[self.words], dim=-1)
        likeness = F.normalize(features_BPH, dim=-1) @ words.T
        return torch.cat([PROBE_SCALE * likeness, self.probe(features_BPH)], -1)

    @torch.no_grad()
    def join(self) -> None:
        """Make what was learned apart ready for the language model: words at the start of a line as inside one, features as long as words.

        The probe's cosine does not see length: features come out 35 times as long as a word, and no layer could then add anything to them.
        """
        weight = self.defender.get_input_embeddings().weight
        weight[word_tokens("")] = weight[self.words]
        last = self.defender.model.visual.merger.mlp[2]
        length = FEATURE_LENGTH / self.length
        for tensor in (last.weight, last.bias):
            tensor.mul_(length)
        self.probe.weight.div_(length)


def word_tokens(before: str) -> list[int]:
    """Token of each attribute's word with `before` in front."""
    tokenizer = build_tokenizer()
    return [tokenizer.encode(before + word)[0] for word in ATTRIBUTES]


def probe_targets(scene: Scene) -> Tensor:
    """[P, attributes + 3]: attributes of the object centred in each cell, its presence, and its centre in [-1, 1]."""
    target = torch.zeros(CELLS, CELLS, len(ATTRIBUTES) + 3)
    for item in scene.objects:
        cell = target[int(item.y * CELLS), int(item.x * CELLS)]
        for word in (item.color, item.shape, "left" if item.x < 0.5 else "right", "above" if item.y < 0.5 else "below"):
            cell[ATTRIBUTES.index(word)] = 1
        cell[-3] = 1
        cell[-2:] = torch.tensor([2 * item.x - 1, 2 * item.y - 1])
    return target.flatten(0, 1)


def _loss(output_BPA: Tensor, target_BPA: Tensor) -> Tensor:
    """Which cell a word is true of, and which word is true of a cell's object (both ways, as CLIP); presence; the object's centre.

    One yes or no a word would also push all features away from all words: a constant which then hides them.
    """
    present = target_BPA[..., -3] > 0
    objects, wanted = output_BPA[present], target_BPA[present]
    loss = F.mse_loss(objects[:, -2:], wanted[:, -2:]) + F.binary_cross_entropy_with_logits(output_BPA[..., -3], target_BPA[..., -3])
    words_BAP, cells_BAP = (x[..., :-3].transpose(1, 2) for x in (output_BPA, target_BPA))
    once = cells_BAP.sum(-1) == 1
    loss = loss + F.cross_entropy(words_BAP[once], cells_BAP[once].argmax(-1))
    for start, stop in WORD_GROUPS:
        loss = loss + 0.5 * F.cross_entropy(objects[:, start:stop], wanted[:, start:stop].argmax(-1))
    return loss


def probe_loss(model: WithProbe, features_BPH: Tensor, scenes: Sequence[Scene]) -> tuple[Tensor, float]:
    """The probe's loss, and the share of objects whose shape it names."""
    output, target = model.read(features_BPH.float()), torch.stack([probe_targets(scene) for scene in scenes])
    present, shapes = target[..., -3] > 0, slice(NUM_COLORS, NUM_NAMES)
    right = output[present][:, shapes].argmax(-1) == target[present][:, shapes].argmax(-1)
    return _loss(output, target), right.float().mean().item()
