"""The work of rows, counted: tokens, pairs of tokens that attend, and floating-point operations.

Stage: beside the backbone. In: a `PackedBatch`, the rules, a `ClickModel`. Out: `Work` of the rows and `Flops`.
Invariant: only what must be done is counted. A multiply-add is 2 operations; a pair that the rules hide, padding,
softmax, norms, and what a kernel computes twice count nothing. So the ratio of two counts is the speed-up that
the mathematics allows, and `Flops` per second over the peak is the model FLOPs utilisation (MFU; Chowdhery et
al. 2022, appendix B).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from dti_ray.config import Window
from dti_ray.gpus import peak_of
from dti_ray.model.backbone import ClickModel
from dti_ray.model.batch import PackedBatch
from dti_ray.model.loss import predicted_text
from dti_ray.model.masks import Coordinates, Rules, content_coordinates, sum_coordinates, visible

CHUNK = 256
KEYS = ("k_proj", "v_proj")


@dataclass(frozen=True)
class Work:
    """What some rows ask for; two of them add up.

    Attributes:
        prefix: tokens of the prefix, once a row.
        content: tokens of items and feedback.
        sums: [SUM] tokens, one a target.
        content_pairs: (query, key) pairs that prefix and content tokens attend to.
        sum_pairs: those of [SUM] tokens.
        far_content_pairs: of the content pairs, those with another interaction.
        far_sum_pairs: of the [SUM] pairs, those with another interaction.
        text_tokens: content tokens that a second loss would predict.
    """

    prefix: int = 0
    content: int = 0
    sums: int = 0
    content_pairs: int = 0
    sum_pairs: int = 0
    far_content_pairs: int = 0
    far_sum_pairs: int = 0
    text_tokens: int = 0

    @property
    def tokens(self) -> int:
        """All tokens, padding left out."""
        return self.prefix + self.content + self.sums

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class Flops:
    """Floating-point operations."""

    forward: int
    backward: int

    @property
    def train(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward


def count_work(batch: PackedBatch, rules: Rules) -> Work:
    """Count the tokens and pairs of some rows, in O(T log T); with `window: tokens` in O(T x T)."""
    rows, prefix = len(batch.tokens), batch.prefix_size
    content, sums = content_coordinates(batch), sum_coordinates(batch)
    is_content = content.prompt > 0
    tokens, targets = int(is_content.sum()), int(batch.is_target.sum())
    own, far = (part * is_content for part in _pairs(content, rules))
    own_text, far_text = (part.gather(1, batch.after) * batch.is_target for part in (own, far))
    if rules.window is Window.TOKENS:  # [SUM] stands one position further, so it sees one token less
        own_text, far_text = (part * batch.is_target for part in _near_pairs(sums, content, rules))
    far_pairs, far_sum_pairs = int(far.sum()), int(far_text.sum())
    return Work(
        prefix=rows * prefix,
        content=tokens,
        sums=targets,
        content_pairs=rows * prefix * (prefix + 1) // 2 + tokens * prefix + int(own.sum()) + far_pairs,
        sum_pairs=targets * (prefix + 1) + int(own_text.sum()) + far_sum_pairs,
        far_content_pairs=far_pairs,
        far_sum_pairs=far_sum_pairs,
        text_tokens=int(predicted_text(batch).sum()),
    )


def count_flops(model: ClickModel, work: Work) -> Flops:
    """Count the operations of a forward pass over some rows in training, and of its backward pass.

    In the last layer every token gives keys, but only [SUM] asks. With a `distance` or `constant` reset, layers
    behind the first make keys from the embeddings too, and every pair with another interaction counts twice. Where
    texts are predicted (`optim.text_weight`), each of their tokens meets all rows of the embedding.
    Backward: gradients of all inputs once, of trainable matrices once more, and two products for each of
    attention's two.
    """
    layers = model.decoder.layers
    assert isinstance(layers, nn.ModuleList)
    head_dim: int = layers[0].self_attn.head_dim  # pyright: ignore[reportAttributeAccessIssue, reportAssignmentType]
    is_dual = model.reset.mode in ("distance", "constant") and model.reset.alpha > 0
    forward = trained = attention = 0
    for number, layer in enumerate(layers):
        is_last, copies = number == len(layers) - 1, 2 if is_dual and number else 1
        askers = work.sums if is_last else work.tokens
        for name, linear in _linears(layer):
            times = work.tokens * copies if any(key in name for key in KEYS) else askers
            flops = 2 * linear.in_features * linear.out_features * times
            forward += flops
            trained += flops if linear.weight.requires_grad else 0
        pairs = work.sum_pairs + (copies - 1) * work.far_sum_pairs
        if not is_last:
            pairs += work.content_pairs + (copies - 1) * work.far_content_pairs
        attention += 4 * model.decoder.config.num_attention_heads * head_dim * pairs
    head = 2 * model.head.rows.in_features * model.head.rows.out_features * work.sums
    if model.text_weight:
        embedding = model.decoder.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding), "its weight may be empty: ZeRO 3 spreads it"
        flops = 2 * embedding.num_embeddings * embedding.embedding_dim * work.text_tokens
        forward += flops
        trained += flops if embedding.weight.requires_grad else 0
    return Flops(forward=forward + head + attention, backward=forward + trained + 2 * head + 2 * attention)


def peak_flops(device: torch.device) -> float | None:
    """Return the peak of a device in bf16 (FLOP/s), or None where it is not known."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def _linears(layer: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear)]


def _pairs(content: Coordinates, rules: Rules) -> tuple[Int[Tensor, "B C"], Int[Tensor, "B C"]]:
    """Return how many tokens of its own interaction, and of earlier ones, each content token sees.

    Within a prompt interactions never fall, so both are ranges, found by bisection.
    """
    if rules.window is Window.TOKENS:
        return _near_pairs(content, content, rules)
    prompt = torch.where(content.prompt > 0, content.prompt, int(content.prompt.max()) + 1)
    stride = int(content.interaction.max()) + 2
    code = (prompt * stride + content.interaction).contiguous()

    def before(interaction: Tensor) -> Tensor:
        return torch.searchsorted(code, (prompt * stride + interaction).contiguous())

    oldest = content.cut - rules.n if rules.window is Window.INTERACTIONS else torch.zeros_like(content.cut)
    own = content.order - before(content.interaction) + 1
    return own, before(content.cut) - before(oldest.clamp(min=0))


def _near_pairs(query: Coordinates, key: Coordinates, rules: Rules) -> tuple[Int[Tensor, "B I"], Int[Tensor, "B I"]]:
    """Count by the rules themselves, some queries at a time."""
    own, far = [], []
    for begin in range(0, query.order.shape[1], CHUNK):
        asked = query.map(lambda x, begin=begin: x[:, begin : begin + CHUNK, None])
        answers = key.map(lambda x: x[:, None, :])
        seen = visible(asked, answers, rules)
        is_own = asked.interaction == answers.interaction
        own.append((seen & is_own).sum(-1))
        far.append((seen & ~is_own).sum(-1))
    return torch.cat(own, dim=1), torch.cat(far, dim=1)
