"""
How far self-speculative decoding drafts, and from which layer: learnt while it decodes, from what was accepted.

Costs are counted in weights read: at batch 1 a layer takes as long as reading its weights, for one token or for eight,
plus a fixed time for the call. They decide what is tried, never what is answered.
"""

from dataclasses import dataclass

from .configuration_adamba import ATTENTION_LAYERS

MAX_DRAFT_TOKENS = 8
FIRST_DRAFT_TOKENS = 2  # doubled after a draft that was all right
MAX_DRAFT_LAYERS = 4
CALL_COST = 400_000  # weights that a CPU core reads in the time (0.1 to 0.2 ms) that torch needs to call one layer
MEMORY = 0.98  # of what was seen, a token later: about the last 50 count
PRIOR_TOKENS = 4.0  # a layer is taken to be this many tokens good before anything was seen
ALLOWED_LOSS = 0.03  # drafting may cost this much more than plain decoding,
FIRST_LOSS = 1.0  # and one token more to find out;
MAX_SAVED = 4.0  # what it saved before can pay for this many tokens of bad luck


@dataclass
class DraftLayer:
    """One layer that may draft, and how well it did (decayed sums). Costs in weights read."""

    layer: int
    shallow_cost: float
    deep_cost: float
    head_cost: float
    confidence: float = 0.0
    accepted: float = 0.0
    emitted: float = 0.0
    spent: float = 0.0
    length: int = FIRST_DRAFT_TOKENS

    @property
    def break_even(self) -> float:
        """
        The chance of being accepted from which one more drafted token pays. It costs a head now; accepted, it saves a
        call of the deep layers; rejected, it wastes the next token's shallow layers.
        """
        return min(1.0, (self.head_cost + self.shallow_cost) / (self.deep_cost + self.shallow_cost))

    def chance(self, confidence: float) -> float:
        """The gate's probability, corrected by how many of the tokens it had promised were really accepted."""
        return min(1.0, confidence * (self.accepted + PRIOR_TOKENS) / (self.confidence + PRIOR_TOKENS))

    @property
    def speed(self) -> float:
        """Tokens per cost; before anything was seen, that of a draft of four tokens, all right."""
        prior_cost = PRIOR_TOKENS * (self.shallow_cost + self.head_cost) + self.deep_cost
        return (self.emitted + PRIOR_TOKENS) / (self.spent + prior_cost)


class DraftPolicy:
    """Chooses the layer of each draft and says when it ends."""

    def __init__(self, layers: list[DraftLayer], plain_cost: float):
        self.layers = layers
        self.plain_cost = plain_cost
        self.balance = FIRST_LOSS  # in tokens of plain decoding

    def choose(self) -> DraftLayer | None:
        """The layer that promises most tokens for its cost; `None` when plain decoding does, or after bad luck."""
        best = max(self.layers, key=lambda layer: layer.speed)
        return best if self.balance > 0 and best.speed * self.plain_cost > 1 else None

    def learn(
        self,
        chosen: DraftLayer | None,
        num_passes: int,
        judged: list[float],
        num_drafted: int,
        num_accepted: int,
        num_emitted: int,
    ) -> None:
        """
        Args:
            num_passes: shallow passes of the round.
            judged: the gate's probability of each drafted token up to the first rejected one.
        """
        for layer in self.layers:
            decay = MEMORY**num_emitted
            layer.confidence *= decay
            layer.accepted *= decay
            layer.emitted *= decay
            layer.spent *= decay
        cost = self.plain_cost
        if chosen is not None:
            cost = num_passes * chosen.shallow_cost + num_drafted * chosen.head_cost + chosen.deep_cost
            if num_drafted:
                right = num_accepted == num_drafted
                chosen.length = min(MAX_DRAFT_TOKENS, 2 * chosen.length) if right else max(1, num_accepted)
                chosen.confidence += sum(judged)
                chosen.accepted += num_accepted
            chosen.emitted += num_emitted
            chosen.spent += cost
        saved = num_emitted * (1 + ALLOWED_LOSS) - cost / self.plain_cost
        self.balance = min(MAX_SAVED, self.balance + saved)


def draft_policy(model, widths: list[int], exit_layer: int | None) -> DraftPolicy:
    """A fresh policy for a model at some widths; `exit_layer` leaves it one layer to draft from."""
    config = model.config
    remaining = iter(widths)
    costs = []
    for kind, layer in zip(config.layer_types, model.model.layers, strict=True):
        share = (next(remaining) / config.hidden_size) ** 2 if kind in ATTENTION_LAYERS else 1.0
        costs.append(share * sum(parameter.numel() for parameter in layer.parameters()) + CALL_COST)
    head_cost = config.vocab_size * config.hidden_size + CALL_COST / 2  # and the choice of a token
    candidates = config.gate_layers if exit_layer is None else [exit_layer]
    if len(candidates) > MAX_DRAFT_LAYERS:  # the shallower ones, where there is something to gain
        step = len(candidates) / (MAX_DRAFT_LAYERS + 1)
        candidates = [candidates[int(step * index)] for index in range(MAX_DRAFT_LAYERS)]
    plain_cost = sum(costs) + head_cost
    layers = []
    for layer in candidates:
        shallow = sum(costs[: layer + 1]) + CALL_COST / 2  # with its gate
        deep = plain_cost - sum(costs[: layer + 1]) + CALL_COST  # with recording states and taking them back
        layers.append(DraftLayer(layer, shallow, deep, head_cost))
    return DraftPolicy(layers, plain_cost)
